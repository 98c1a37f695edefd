/*
 * What differs between hosts and QEMU bases, for the raw file engine
 *
 * The engine is written against the newest API; whatever an older base or an
 * older host header lacks is supplied here and nowhere else.  Tests are for
 * features, never for version numbers: a newer base is not a superset of an
 * older one.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_RAW_AIO_COMPAT_H
#define BLOCK_RAW_AIO_COMPAT_H

#include <sys/uio.h>

/*
 * Host: per-request flags of preadv2(2), pwritev2(2) and io_submit(2).  glibc
 * and musl declare the calls together with the flags.  Where there are none,
 * RAW_AIO_HAVE_RWF is 0 and the flags are never passed to the kernel.
 */
#if defined(CONFIG_LINUX) && defined(RWF_DSYNC) && defined(RWF_NOWAIT)
#define RAW_AIO_HAVE_RWF 1
#define RAW_AIO_RWF_DSYNC RWF_DSYNC
#define RAW_AIO_RWF_NOWAIT RWF_NOWAIT
#else
#define RAW_AIO_HAVE_RWF 0
#define RAW_AIO_RWF_DSYNC 0
#define RAW_AIO_RWF_NOWAIT 0
#endif

/*
 * Host: libaio older than 0.3.111 has no place for the flags in struct iocb.
 */
#if RAW_AIO_HAVE_RWF && defined(HAVE_IO_PREP_PWRITEV2)
#define RAW_AIO_HAVE_IOCB_FLAGS 1
#else
#define RAW_AIO_HAVE_IOCB_FLAGS 0
#endif

#ifndef O_DIRECT
#define O_DIRECT 0
#endif

#endif /* BLOCK_RAW_AIO_COMPAT_H */
