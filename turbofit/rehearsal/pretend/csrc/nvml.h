/* What the files of the NVML stand-in share. Handles are numbers: GPU i is 1 + i, MIG instance k of
 * it is 1000 + 100 * i + k. What a machine is comes from nvml_values.c, key by key. */
#ifndef TURBOFIT_PRETEND_NVML_H
#define TURBOFIT_PRETEND_NVML_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef const void *device;

enum {
    SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9, FUNCTION_NOT_FOUND = 13, GPU_IS_LOST = 15, VERSION_MISMATCH = 25, UNKNOWN = 999
};

#define API __attribute__((visibility("default"))) int
#define TEXT 512

/* The value of a key ("gpu.0.total"), or NULL; use it before the next question. */
const char *nvml_value(char out[TEXT], const char *format, ...) __attribute__((format(printf, 2, 3)));

#define NUMBER(fallback, ...) \
    ({ char b_[TEXT]; const char *v_ = nvml_value(b_, __VA_ARGS__); v_ ? strtoull(v_, NULL, 0) : (u64)(fallback); })
#define HAS(...) ({ char b_[TEXT]; nvml_value(b_, __VA_ARGS__) != NULL; })

static inline int is_mig(device d) { return (size_t)d >= 1000; }
static inline int gpu_of(device d)
{
    return is_mig(d) ? ((int)(size_t)d - 1000) / 100 : (int)(size_t)d - 1;
}
static inline int part_of(device d) { return ((int)(size_t)d - 1000) % 100; }

/* The prefix of a device's keys: "gpu.0" or "gpu.0.mig.1". */
const char *nvml_name(device d, char out[64]);
int nvml_copy(char *to, u32 size, const char *text);
/* A number of the device's own, or "not supported" where the machine has none. */
int nvml_number(device d, const char *key, u32 *out);

/* Answers with the GPU's error, if it has one ("gpu.0.error"). */
#define CHECK(d) \
    do { \
        int e_ = (int)NUMBER(SUCCESS, "gpu.%d.error", gpu_of(d)); \
        if (e_) \
            return e_; \
    } while (0)

struct pci {
    char legacy[16];
    u32 domain, bus, device, id, subsystem;
    char text[32];
};

void nvml_fill_pci(struct pci *out, u32 bus);

#endif
