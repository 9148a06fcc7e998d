/* Stand-in for libcuda.so.1: devices, contexts, modules and launches, as torch, Triton and NVRTC's
 * callers ask for them. A context is its device; a module and a function are handles. */
#define _GNU_SOURCE
#include "account.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))

enum { success = 0, invalid_value = 1, no_memory = 2, no_device = 100, invalid_device = 101,
       invalid_context = 201 };

static void *context_of(int device) { return (void *)(size_t)(device + 1); }

API int cuInit(unsigned flags)
{
    (void)flags;
    return pretend_device_count() ? success : no_device;
}

API int cuDriverGetVersion(int *version)
{
    *version = 13000;
    return success;
}

API int cuDeviceGetCount(int *count)
{
    *count = pretend_device_count();
    return success;
}

API int cuDeviceGet(int *device, int ordinal)
{
    *device = ordinal;
    return pretend_device(ordinal) ? success : invalid_device;
}

API int cuDeviceGetName(char *name, int size, int device)
{
    if (!pretend_device(device))
        return invalid_device;
    snprintf(name, (size_t)size, "%s", pretend_device(device)->name);
    return success;
}

API int cuDeviceGetUuid_v2(unsigned char *out, int device)
{
    if (!pretend_device(device))
        return invalid_device;
    pretend_uuid(device, out);
    return success;
}

API int cuDeviceTotalMem_v2(size_t *bytes, int device)
{
    if (!pretend_device(device))
        return invalid_device;
    *bytes = pretend_device(device)->total;
    return success;
}

API int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)
{
    if (!pretend_device(device))
        return invalid_device;
    *flags = 0;
    *active = pretend_has_context(device);
    return success;
}

API int cuDevicePrimaryCtxRetain(void **context, int device)
{
    if (!pretend_device(device))
        return invalid_device;
    *context = context_of(device);
    return pretend_context(device) ? no_memory : success;
}

API int cuDevicePrimaryCtxRelease_v2(int device)
{
    (void)device;
    return success;
}

API int cuCtxGetCurrent(void **context)
{
    *context = *pretend_has_current() ? context_of(*pretend_current_device()) : NULL;
    return success;
}

API int cuCtxSetCurrent(void *context)
{
    *pretend_has_current() = context != NULL;
    if (context)
        *pretend_current_device() = (int)(size_t)context - 1;
    return success;
}

API int cuCtxGetDevice(int *device)
{
    if (!*pretend_has_current())
        return invalid_context;
    *device = *pretend_current_device();
    return success;
}

API int cuCtxSynchronize(void)
{
    pretend_called();
    pretend_synchronised(*pretend_current_device());
    return success;
}

API int cuGetErrorName(int error, const char **text)
{
    *text = error == no_memory ? "CUDA_ERROR_OUT_OF_MEMORY" : error ? "CUDA_ERROR" : "CUDA_SUCCESS";
    return success;
}

/* CU_POINTER_ATTRIBUTE: 1 context, 2 memory type, 3 device pointer, 9 device ordinal */
API int cuPointerGetAttribute(void *value, int attribute, uint64_t pointer)
{
    int device, pinned, found = pretend_locate((void *)(size_t)pointer, &device, &pinned);
    if (!found && !pinned)
        return invalid_value;
    switch (attribute) {
    case 1: *(void **)value = context_of(found ? device : *pretend_current_device()); break;
    case 2: *(unsigned *)value = found ? 2 : 1; break; /* device, host */
    case 3: *(uint64_t *)value = pointer; break;
    case 9: *(int *)value = found ? device : *pretend_current_device(); break;
    default: return invalid_value;
    }
    return success;
}

API int cuMemGetAddressRange_v2(uint64_t *base, size_t *size, uint64_t pointer)
{
    void *begin;
    size_t bytes;
    if (pretend_range((void *)(size_t)pointer, &begin, &bytes))
        return invalid_value;
    if (base)
        *base = (uint64_t)(size_t)begin;
    if (size)
        *size = bytes;
    return success;
}

API int cuMemGetAddressRange(uint64_t *base, size_t *size, uint64_t pointer)
{
    return cuMemGetAddressRange_v2(base, size, pointer);
}

/* ---------------------------------------------------------------- modules */

static int make(void **out)
{
    pretend_called();
    *out = malloc(1);
    return *out ? success : no_memory;
}

API int cuModuleLoad(void **module, const char *path)
{
    (void)path;
    return make(module);
}

API int cuModuleLoadData(void **module, const void *image)
{
    (void)image;
    return make(module);
}

API int cuModuleLoadDataEx(void **module, const void *image, unsigned n, void *options, void *values)
{
    (void)image, (void)n, (void)options, (void)values;
    return make(module);
}

API int cuModuleUnload(void *module)
{
    free(module);
    return success;
}

API int cuModuleGetFunction(void **function, void *module, const char *name)
{
    (void)name;
    *function = module; /* unloaded with its module */
    return success;
}

/* CU_FUNC_ATTRIBUTE: 0 threads a block, 1 shared, 3 local, 4 registers, 8 dynamic shared */
API int cuFuncGetAttribute(int *value, int attribute, void *function)
{
    (void)function;
    *value = attribute == 0 ? 1024 : attribute == 4 ? 128 : attribute == 8 ? 48 << 10 : 0;
    return success;
}

API int cuFuncSetAttribute(void *function, int attribute, int value)
{
    const struct pretend_device *d = pretend_device(*pretend_current_device());
    (void)function;
    return attribute == 8 && d && (size_t)value > d->smem_block ? invalid_value : success;
}

API int cuFuncSetCacheConfig(void *function, int config)
{
    (void)function, (void)config;
    return success;
}

API int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                       unsigned bz, unsigned shared, void *stream, void **args, void **extra)
{
    (void)f, (void)gx, (void)gy, (void)gz, (void)bx, (void)by, (void)bz, (void)shared, (void)stream,
        (void)args, (void)extra;
    pretend_called();
    return success;
}

API int cuLaunchKernelEx(const void *config, void *f, void **args, void **extra)
{
    (void)config, (void)f, (void)args, (void)extra;
    pretend_called();
    return success;
}

API int cuLaunchCooperativeKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                  unsigned by, unsigned bz, unsigned shared, void *stream,
                                  void **args)
{
    return cuLaunchKernel(f, gx, gy, gz, bx, by, bz, shared, stream, args, NULL);
}

API int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, void *f, int threads, size_t shared)
{
    (void)f, (void)shared;
    *n = threads > 0 && 1536 / threads < 16 ? 1536 / threads : 16;
    return success;
}

API int cuOccupancyMaxActiveClusters(int *n, void *f, const void *config)
{
    const struct pretend_device *d = pretend_device(*pretend_current_device());
    (void)f, (void)config;
    *n = d ? d->sm_count / 2 : 1;
    return success;
}

API int cuTensorMapEncodeTiled(void *map)
{
    memset(map, 0, 128); /* CUtensorMap, which only kernels read */
    return success;
}

API int cuTensorMapEncodeIm2col(void *map) { return cuTensorMapEncodeTiled(map); }

API int cuMemsetD32Async(uint64_t at, unsigned value, size_t count, void *stream)
{
    (void)stream;
    pretend_called();
    if (value == 0)
        pretend_fill((void *)(size_t)at, 0, 4 * count);
    return success;
}

API int cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes)
{
    pretend_called();
    int status = pretend_memory_info(*pretend_current_device(), free_bytes, total_bytes);
    return status ? no_memory : success;
}
