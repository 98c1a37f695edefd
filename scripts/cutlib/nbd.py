# SPDX-License-Identifier: GPL-2.0-or-later
"""A client of NBD that has many requests in flight: docs/interop/nbd.rst of QEMU names the specification."""

import socket
import struct

INIT_MAGIC, OPTION_MAGIC, REPLY_MAGIC = 0x4e42444d41474943, 0x49484156454f5054, 0x3e889045565a9
REQUEST_MAGIC, SIMPLE_MAGIC = 0x25609513, 0x67446698
OPT_GO, REP_ACK, REP_INFO = 7, 1, 3
FLAG_FIXED, FLAG_NO_ZEROES = 1, 2
READ, WRITE, DISCONNECT, FLUSH, TRIM, ZEROES = 0, 1, 2, 3, 4, 6
FUA = 1


class Failed(Exception):
    pass


class Client:
    def __init__(self, path, name, timeout):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self.socket.connect(path)
        magic, option, flags = struct.unpack('>QQH', self.receive(18))
        if (magic, option) != (INIT_MAGIC, OPTION_MAGIC) or not flags & FLAG_FIXED:
            raise Failed('this is no NBD server')
        self.socket.sendall(struct.pack('>I', flags & (FLAG_FIXED | FLAG_NO_ZEROES)))
        name = name.encode()
        data = struct.pack(f'>I{len(name)}sH', len(name), name, 0)
        self.socket.sendall(struct.pack('>QII', OPTION_MAGIC, OPT_GO, len(data)) + data)
        while True:
            magic, _, reply, length = struct.unpack('>QIII', self.receive(20))
            self.receive(length)
            if magic != REPLY_MAGIC or reply not in (REP_ACK, REP_INFO):
                raise Failed(f'the NBD server refuses the export: {reply:#x}')
            if reply == REP_ACK:
                break

    def receive(self, count):
        found = b''
        while len(found) < count:
            try:
                part = self.socket.recv(count - len(found))
            except TimeoutError:
                raise Failed(f'no answer after {self.socket.gettimeout():.0f} s') from None
            if not part:
                raise Failed('the NBD server is gone')
            found += part
        return found

    def send(self, handle, kind, offset=0, length=0, data=b'', flags=0):
        self.socket.sendall(struct.pack('>IHHQQI', REQUEST_MAGIC, flags, kind, handle, offset, length or len(data)) + data)

    def reply(self):
        """The handle of a request that is done."""
        magic, error, handle = struct.unpack('>IIQ', self.receive(16))
        if magic != SIMPLE_MAGIC:
            raise Failed('an answer that makes no sense')
        if error:
            raise Failed(f'request {handle}: error {error}')
        return handle

    def close(self):
        self.send(0, DISCONNECT)
        self.socket.close()
