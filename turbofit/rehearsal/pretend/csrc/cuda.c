/* Stand-in for libcuda.so.1: the driver calls that TurboMind makes, which are
 * virtual memory management and multicast objects. */
#include "account.h"

#include <stddef.h>

#define API __attribute__((visibility("default")))

enum { success = 0, invalid_value = 1, no_memory = 2, invalid_device = 101, no_peer = 217 };

typedef struct { int type, handles, location_type, location; } allocation_; /* as far as we read */
typedef struct { int type, device, flags; } access_;

static int of_status(int status)
{
    static const int map[] = {success, invalid_value, no_memory, invalid_device};
    return map[status];
}

API int cuGetErrorString(int error, const char **text)
{
    switch (error) {
    case success: *text = "no error"; break;
    case invalid_value: *text = "invalid argument"; break;
    case no_memory: *text = "out of memory"; break;
    case invalid_device: *text = "invalid device ordinal"; break;
    default: *text = "unknown error"; return invalid_value;
    }
    return success;
}

/* The numbers are those of cudaDeviceAttr, see cudart_device.c; no multicast: it takes NVSwitch. */
API int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    return pretend_attribute(value, attribute, device) ? invalid_device : success;
}

API int cuMemGetAllocationGranularity(size_t *step, const allocation_ *properties, int option)
{
    (void)properties;
    (void)option;
    *step = pretend_vmm_granularity();
    return success;
}

API int cuMemCreate(uint64_t *handle, size_t size, const allocation_ *properties, uint64_t flags)
{
    (void)flags;
    pretend_called();
    return of_status(pretend_vmm_create(properties->location, size, handle));
}

API int cuMemRelease(uint64_t handle) { return of_status(pretend_vmm_release(handle)); }

API int cuMemAddressReserve(uint64_t *out, size_t size, size_t align, uint64_t at, uint64_t flags)
{
    (void)align;
    (void)at;
    (void)flags;
    void *p;
    int status = pretend_vmm_reserve(size, &p);
    *out = (uint64_t)(size_t)p;
    return of_status(status);
}

API int cuMemAddressFree(uint64_t at, size_t size)
{
    return of_status(pretend_vmm_unreserve((void *)(size_t)at, size));
}

API int cuMemMap(uint64_t at, size_t size, size_t offset, uint64_t handle, uint64_t flags)
{
    (void)offset;
    (void)flags;
    return of_status(pretend_vmm_map((void *)(size_t)at, size, handle));
}

API int cuMemUnmap(uint64_t at, size_t size)
{
    return of_status(pretend_vmm_unmap((void *)(size_t)at, size));
}

API int cuMemSetAccess(uint64_t at, size_t size, const access_ *access, size_t count)
{
    (void)size;
    for (size_t i = 0; i < count; ++i) {
        int status = pretend_vmm_access((void *)(size_t)at, access[i].device);
        if (status)
            return of_status(status);
    }
    return success;
}

API int cuMemRetainAllocationHandle(uint64_t *handle, void *at)
{
    return of_status(pretend_vmm_handle_at(at, handle));
}

API int cuMulticastCreate(uint64_t *handle, const void *properties)
{
    (void)properties;
    return of_status(pretend_vmm_multicast(handle));
}

API int cuMulticastAddDevice(uint64_t handle, int device)
{
    (void)handle;
    (void)device;
    return success;
}

API int cuMulticastBindMem(uint64_t handle, size_t offset, uint64_t memory, size_t memory_offset,
                           size_t size, uint64_t flags)
{
    (void)handle, (void)offset, (void)memory, (void)memory_offset, (void)size, (void)flags;
    return success;
}

API int cuMulticastUnbind(uint64_t handle, int device, size_t offset, size_t size)
{
    (void)handle, (void)device, (void)offset, (void)size;
    return success;
}

API int cuMulticastGetGranularity(size_t *step, const void *properties, int option)
{
    (void)properties;
    (void)option;
    *step = pretend_vmm_granularity();
    return success;
}
