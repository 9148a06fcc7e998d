/* The whole pretend machine as NVML shows it: physical indices, every process, whatever
 * CUDA_VISIBLE_DEVICES says. Asking takes no slot, no context and no memory. */
#ifndef TURBOFIT_PRETEND_MACHINE_H
#define TURBOFIT_PRETEND_MACHINE_H

#include "account.h"

#define PRETEND_UUID_TEXT 48

struct machine_process {
    int pid;
    size_t bytes; /* held on the device, context included */
};

PRETEND_API int machine_count(void);
PRETEND_API const struct pretend_device *machine_device(int physical);
PRETEND_API int machine_reaches(int from, int to);
PRETEND_API int machine_uuid(int physical, unsigned char out[16]);
PRETEND_API int machine_uuid_text(int physical, char out[PRETEND_UUID_TEXT]);
/* Living processes with a context or memory on a device, at most `room`; gives how many there are. */
PRETEND_API int machine_processes(int physical, struct machine_process *out, int room);

#endif
