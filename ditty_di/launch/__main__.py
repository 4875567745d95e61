"""Entry point of one rank: `python -m ditty_di.launch RUN_DIR`."""

import sys

from ditty_di.launch.worker import leave, main, own_process

if __name__ == "__main__":
    own_process()
    leave(main(sys.argv[1]))
