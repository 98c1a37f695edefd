/*
 * What raw-aio-model and raw-aio-model-faults.so tell each other about a system
 * call that fails
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef RAW_AIO_MODEL_FAULTS_H
#define RAW_AIO_MODEL_FAULTS_H

typedef enum ModelCall {
    CALL_PREAD,
    CALL_PWRITE,
    CALL_PREADV,
    CALL_PWRITEV,
    CALL_PREADV2,
    CALL_PWRITEV2,
    CALL_IO_SETUP,
    CALL_IO_SUBMIT,
    CALL_IO_GETEVENTS,
    CALL_EVENT,             /* the result of a request of Linux AIO */
    CALL_FDATASYNC,
    CALL_FALLOCATE,
    CALL_FTRUNCATE,
    CALL_EVENTFD,
    CALL_READ,              /* of an eventfd */
    CALL_WRITE,             /* of an eventfd */
    CALL_PTHREAD_CREATE,
    CALL__MAX,
} ModelCall;

typedef enum ModelHow {
    HOW_COUNT,              /* it does not fail */
    HOW_ERRNO,
    HOW_SHORT,              /* transfers, or takes, less than asked for */
    HOW_ODD,                /* the same, but not a multiple of a sector */
    HOW_ZERO,               /* a write that writes nothing */
    HOW_SLEEP,              /* until the main loop has served timers */
} ModelHow;

typedef struct ModelFault {
    /* Constant */
    ModelCall call;
    ModelHow how;
    int err;                /* HOW_ERRNO: positive errno */
    unsigned at;            /* the call that fails; they are counted from 1 */
    bool onwards;           /* and all after it */
    const char *const *call_name;

    /* Set by the program; atomic */
    bool new_workers;       /* threads that begin now are workers */
    bool armed;             /* calls are counted, and may fail */
    int ignored_fd;         /* not used by what is tested */
    unsigned beats;         /* timers that the main loop has served */

    /* Atomic */
    unsigned calls[CALL__MAX];
    unsigned asleep;        /* calls that sleep now, in workers */
    unsigned slept, slept_at_home;  /* in workers, and in other threads */
    unsigned slept_fdsync;  /* of those, io_submit(2) of a flush */
    unsigned descriptors;   /* of the image that were replaced */
    unsigned happened;      /* times that it went wrong */

    /* About the last one; written before "happened" */
    bool nowait, dsync;     /* flags */
    bool worker;            /* who called */
    bool fdsync;
    uint64_t offset, bytes; /* bytes is 0 where there are none */
} ModelFault;

/*
 * Found with dlsym(3).
 *
 * Returns: NULL if the library makes faults of another kind
 */
typedef ModelFault *ModelFaultGet(void);
#define MODEL_FAULT_GET "raw_aio_model_fault"
ModelFaultGet raw_aio_model_fault;

#endif /* RAW_AIO_MODEL_FAULTS_H */
