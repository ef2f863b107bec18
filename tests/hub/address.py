"""Where the loopback Hub of this process is: a port of 127.0.0.1 that refuses every connection until the Hub starts."""

import socket


SOCKET = socket.socket()
SOCKET.bind(("127.0.0.1", 0))
URL = f"http://127.0.0.1:{SOCKET.getsockname()[1]}"
