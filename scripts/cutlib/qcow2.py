# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest would read from a qcow2 image: no backing file, no compression, no encryption, no snapshots."""

import struct

MAGIC = 0x514649fb
OFFSET = 0x00fffffffffffe00
CORRUPT = 2


class Broken(Exception):
    """The image is damaged, or of a kind that this does not read."""


def content(image):
    """The whole virtual disk, from the bytes of the image."""
    magic, version = struct.unpack_from('>II', image)
    if magic != MAGIC or version != 3:
        raise Broken('no qcow2 header')
    cluster = 1 << struct.unpack_from('>I', image, 20)[0]
    size, = struct.unpack_from('>Q', image, 24)
    l1_size, l1_at = struct.unpack_from('>IQ', image, 36)
    features, = struct.unpack_from('>Q', image, 72)
    if features & CORRUPT:
        raise Broken('marked as corrupt')
    zeroes = bytes(cluster)
    parts = []
    for l1 in struct.unpack_from(f'>{l1_size}Q', image, l1_at):
        l2_at = l1 & OFFSET
        if not l2_at:
            parts.append(zeroes * (cluster // 8))
            continue
        if l2_at + cluster > len(image):
            raise Broken(f'a table at {l2_at}, behind the end')
        for l2 in struct.unpack_from(f'>{cluster // 8}Q', image, l2_at):
            at = l2 & OFFSET
            if l2 >> 62 & 1:
                raise Broken('a compressed cluster')
            if l2 & 1 or not at:
                parts.append(zeroes)
            elif at + cluster > len(image):
                raise Broken(f'a cluster at {at}, behind the end')
            else:
                parts.append(image[at:at + cluster])
    return b''.join(parts)[:size]
