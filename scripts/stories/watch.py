"""Looks at a TLS port of Ray ten times a second until it is ended: seconds of the epoch and the serial number of
the leaf that is served, or `none`, one line a look. It shows the leaf of a node, so that Ray logs no stranger.

watch.py HOST PORT LEAF_FILE
"""

import sys
import time

from probe import served_serial

PAUSE = 0.1


def main():
    host, port, leaf = sys.argv[1:]
    key = leaf.removesuffix(".crt") + ".key"
    while True:
        try:
            serial = served_serial(host, int(port), leaf, key)
        except OSError:
            serial = "none"
        print(f"{time.time():.2f} {serial}", flush=True)
        time.sleep(PAUSE)


if __name__ == "__main__":
    main()
