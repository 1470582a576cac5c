"""`python splice.py PATH | HOST PORT`: stdin and stdout to a socket, as an inetd server looks.

So that tests which start their server themselves reach a daemon that runs already.
"""

from __future__ import annotations

import os
import socket
import sys
import threading

PIECE_BYTES = 1 << 16


def main() -> None:
    """Until either side ends."""
    if len(sys.argv) == 2:
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(sys.argv[1])
    else:
        peer = socket.create_connection((sys.argv[1], int(sys.argv[2])))

    def send() -> None:
        while data := os.read(0, PIECE_BYTES):
            peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)

    threading.Thread(target=send, daemon=True).start()
    while data := peer.recv(PIECE_BYTES):
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]


if __name__ == "__main__":
    main()
