/* Stand-in for libcudart.so.12, devices and errors. Layouts and numbers are those of CUDA 12's
 * ABI. Entry points in several files: cudart_memory.c, cudart_launch.c. */
#define _GNU_SOURCE
#include "cudart.h"

#include <string.h>

/* cudaDeviceProp of CUDA 12 */
typedef struct {
    char name[256], uuid[16], luid[8];
    unsigned luid_mask;
    size_t total_memory, shared_per_block;
    int regs_per_block, warp_size;
    size_t pitch;
    int max_threads_per_block, max_threads_dim[3], max_grid[3], clock_rate;
    size_t const_memory;
    int major, minor;
    size_t texture_alignment, texture_pitch_alignment;
    int overlap, sm_count, timeout, integrated, map_host, compute_mode;
    int textures[40];
    size_t surface_alignment;
    int concurrent_kernels, ecc, pci_bus, pci_device, pci_domain, tcc, async_engines,
        unified_addressing, memory_clock, bus_width, l2, persisting_l2, threads_per_sm,
        stream_priorities, global_l1, local_l1;
    size_t shared_per_sm;
    int regs_per_sm, managed, multi_gpu, multi_gpu_group, native_atomics, double_ratio,
        pageable, concurrent_managed, preemption, host_pointer, cooperative, cooperative_multi;
    size_t shared_optin;
    int page_tables, direct_managed, blocks_per_sm, window;
    size_t shared_reserved;
    int host_register, sparse, read_only, semaphores, memory_pools, rdma;
    unsigned rdma_flush;
    int rdma_order;
    unsigned pool_handles;
    int deferred, ipc_event, cluster_launch, unified_pointers, reserved[63];
} properties_;
_Static_assert(sizeof(properties_) == 1032, "cudaDeviceProp of CUDA 12");

/* ---------------------------------------------------------------- devices */

API error_t_ cudaGetDeviceCount(int *n)
{
    *n = pretend_device_count();
    return *n ? success : give(no_device);
}

API error_t_ cudaGetDevice(int *d)
{
    *d = here();
    return success;
}

API error_t_ cudaSetDevice(int d)
{
    pretend_called();
    if (!pretend_device(d))
        return give(invalid_device);
    *pretend_current_device() = d;
    return success;
}

API error_t_ cudaGetDeviceProperties_v2(properties_ *p, int d)
{
    const struct pretend_device *from = pretend_device(d);
    if (!from)
        return give(invalid_device);
    memset(p, 0, sizeof *p);
    memcpy(p->name, from->name, sizeof p->name);
    p->uuid[15] = (char)(d + 1);
    p->total_memory = from->total;
    p->shared_per_block = 48 << 10;
    p->regs_per_block = p->regs_per_sm = 65536;
    p->warp_size = 32;
    p->max_threads_per_block = p->max_threads_dim[0] = p->max_threads_dim[1] = 1024;
    p->max_threads_dim[2] = 64;
    p->max_grid[0] = 0x7fffffff;
    p->max_grid[1] = p->max_grid[2] = 65535;
    p->clock_rate = 1500000;
    p->const_memory = 65536;
    p->major = from->major;
    p->minor = from->minor;
    p->sm_count = from->sm_count;
    p->texture_alignment = p->surface_alignment = 512;
    p->map_host = p->concurrent_kernels = p->unified_addressing = 1;
    p->async_engines = 2;
    p->pci_bus = d + 1;
    p->memory_clock = 9000000;
    p->bus_width = 384;
    p->l2 = (int)from->l2;
    p->threads_per_sm = 1536;
    p->shared_per_sm = from->smem_sm;
    p->shared_optin = from->smem_block;
    p->shared_reserved = 1024;
    p->blocks_per_sm = 16;
    p->cooperative = p->memory_pools = 1;
    p->cluster_launch = from->major >= 9;
    return success;
}

/* cudaDeviceAttr and CUdevice_attribute have the same numbers. */
API error_t_ cudaDeviceGetAttribute(int *value, int attribute, int d)
{
    const struct pretend_device *from = pretend_device(d);
    if (!from)
        return give(invalid_device);
    switch (attribute) {
    case 8: *value = 48 << 10; break;            /* shared memory per block */
    case 10: *value = 32; break;                 /* warp */
    case 16: *value = from->sm_count; break;
    case 38: *value = (int)from->l2; break;
    case 39: *value = 1536; break;               /* threads per multiprocessor */
    case 75: *value = from->major; break;
    case 76: *value = from->minor; break;
    case 81: *value = (int)from->smem_sm; break;
    case 82: *value = 65536; break;              /* registers per multiprocessor */
    case 95: *value = 1; break;                  /* cooperative launch */
    case 97: *value = (int)from->smem_block; break;
    case 115: *value = 1; break;                 /* memory pools */
    default: *value = 0;
    }
    return success;
}

API error_t_ cudaDeviceCanAccessPeer(int *can, int from, int to)
{
    *can = from != to && pretend_can_access(from, to);
    return success;
}

API error_t_ cudaDeviceSynchronize(void)
{
    pretend_called();
    pretend_synchronised(here());
    return success;
}

/* ----------------------------------------------------------------- errors */

API error_t_ cudaGetLastError(void)
{
    error_t_ e = *pretend_last_error();
    *pretend_last_error() = success;
    return e;
}

API error_t_ cudaPeekAtLastError(void) { return *pretend_last_error(); }

static const struct { error_t_ code; const char *name, *text; } errors[] = {
    {success, "cudaSuccess", "no error"},
    {invalid_value, "cudaErrorInvalidValue", "invalid argument"},
    {no_memory, "cudaErrorMemoryAllocation", "out of memory"},
    {no_device, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {invalid_device, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {no_peer, "cudaErrorPeerAccessUnsupported", "peer access is not supported between these two devices"},
    {not_supported, "cudaErrorNotSupported", "operation not supported"},
};

API const char *cudaGetErrorString(error_t_ e)
{
    for (size_t i = 0; i < sizeof errors / sizeof *errors; ++i)
        if (errors[i].code == e)
            return errors[i].text;
    return "unrecognized error code";
}

API const char *cudaGetErrorName(error_t_ e)
{
    for (size_t i = 0; i < sizeof errors / sizeof *errors; ++i)
        if (errors[i].code == e)
            return errors[i].name;
    return "cudaErrorUnknown";
}

/* ---------------------------------------------------- the driver, by name */

static int encode_tensor_map(void *map)
{
    memset(map, 0, 128); /* CUtensorMap, which only kernels read */
    return 0;
}

API error_t_ cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags,
                                    int *result)
{
    (void)flags;
    int known = !strcmp(name, "cuTensorMapEncodeTiled");
    *function = known ? (void *)encode_tensor_map : NULL;
    if (result)
        *result = known ? 0 : 1; /* success, symbol not found */
    return success;
}
