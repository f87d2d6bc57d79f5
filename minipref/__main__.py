from .pretrain import main
import sys
main(sys.argv[2:])
