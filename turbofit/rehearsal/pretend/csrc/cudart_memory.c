/* Stand-in for libcudart, memory: everything here is the account's. */
#define _GNU_SOURCE
#include "cudart.h"

typedef struct { int type, device; void *on_device, *on_host; } pointer_attributes_;

API error_t_ cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes)
{
    pretend_called();
    return of_status(pretend_memory_info(here(), free_bytes, total_bytes));
}

API error_t_ cudaMalloc(void **out, size_t size)
{
    pretend_called();
    return of_status(pretend_malloc(here(), size, out));
}

API error_t_ cudaFree(void *p)
{
    pretend_called();
    if (!p)
        return need_context(); /* the idiom that begins CUDA */
    pretend_synchronised(here());
    return of_status(pretend_free(p));
}

API error_t_ cudaHostAlloc(void **out, size_t size, unsigned flags)
{
    (void)flags;
    pretend_called();
    return need_context() ? no_memory : of_status(pretend_pinned(size, out));
}

API error_t_ cudaFreeHost(void *p)
{
    pretend_called();
    return of_status(pretend_free(p));
}

API error_t_ cudaHostRegister(void *p, size_t size, unsigned flags)
{
    (void)p, (void)flags;
    pretend_called();
    return need_context() ? no_memory : of_status(pretend_register(size));
}

/* Addresses are one space for the host and its cards, so that pinned memory is seen where it is. */
API error_t_ cudaHostGetDevicePointer(void **out, void *p, unsigned flags)
{
    (void)flags;
    *out = p;
    return success;
}

API error_t_ cudaHostUnregister(void *p)
{
    (void)p;
    return success;
}

API error_t_ cudaMallocFromPoolAsync(void **out, size_t size, struct pretend_pool *pool, void *stream)
{
    (void)stream;
    pretend_called();
    return of_status(pretend_pool_malloc(pool, size, out));
}

API error_t_ cudaMallocAsync(void **out, size_t size, void *stream)
{
    pretend_called();
    return of_status(pretend_pool_malloc(pretend_pool_default(device_of(stream)), size, out));
}

API error_t_ cudaFreeAsync(void *p, void *stream)
{
    (void)stream;
    pretend_called();
    return of_status(pretend_free(p));
}

API error_t_ cudaDeviceGetDefaultMemPool(struct pretend_pool **pool, int d)
{
    *pool = pretend_pool_default(d);
    return *pool ? success : give(invalid_device);
}

API error_t_ cudaMemPoolCreate(struct pretend_pool **pool, const int *properties)
{
    /* cudaMemPoolProps: allocType, handleTypes, location.type, location.id */
    pretend_called();
    *pool = pretend_pool_create(properties[3]);
    return *pool ? success : give(invalid_value);
}

API error_t_ cudaMemPoolDestroy(struct pretend_pool *pool)
{
    return of_status(pretend_pool_destroy(pool));
}

API error_t_ cudaMemPoolSetAttribute(struct pretend_pool *pool, int attribute, void *value)
{
    if (attribute == 4) /* cudaMemPoolAttrReleaseThreshold */
        pretend_pool_threshold(pool, *(uint64_t *)value);
    return success;
}

API error_t_ cudaMemPoolGetAttribute(struct pretend_pool *pool, int attribute, void *value)
{
    (void)pool;
    if (attribute >= 4) /* the first three are integers, the others numbers of bytes */
        *(uint64_t *)value = 0;
    else
        *(int *)value = 0;
    return success;
}

API error_t_ cudaMemPoolSetAccess(struct pretend_pool *pool, const void *list, size_t count)
{
    (void)pool, (void)list, (void)count;
    return success;
}

API error_t_ cudaMemPoolTrimTo(struct pretend_pool *pool, size_t keep)
{
    pretend_pool_trim(pool, keep);
    return success;
}

API error_t_ cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream)
{
    (void)kind;
    (void)stream;
    pretend_called();
    pretend_copy(to, from, n);
    return success;
}

API error_t_ cudaMemcpy(void *to, const void *from, size_t n, int kind)
{
    (void)kind;
    pretend_called();
    pretend_copy(to, from, n);
    return success;
}

API error_t_ cudaMemcpyPeer(void *to, int to_device, const void *from, int from_device, size_t n)
{
    (void)to_device;
    (void)from_device;
    pretend_called();
    pretend_copy(to, from, n);
    return success;
}

API error_t_ cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device,
                                 size_t n, void *stream)
{
    (void)stream;
    return cudaMemcpyPeer(to, to_device, from, from_device, n);
}

API error_t_ cudaMemcpyToSymbol(const void *symbol, const void *from, size_t n, size_t offset,
                                int kind)
{
    (void)symbol, (void)from, (void)n, (void)offset, (void)kind; /* only kernels read it */
    pretend_called();
    return success;
}

API error_t_ cudaGetSymbolAddress(void **out, const void *symbol)
{
    *out = (void *)symbol;
    return success;
}

API error_t_ cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, int kind, void *stream)
{
    (void)kind;
    (void)stream;
    pretend_called();
    if (width * height <= 1 << 20)
        for (size_t i = 0; i < height; ++i)
            pretend_copy((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
    return success;
}

API error_t_ cudaMemset(void *p, int value, size_t n)
{
    pretend_called();
    pretend_fill(p, value, n);
    return success;
}

API error_t_ cudaMemsetAsync(void *p, int value, size_t n, void *stream)
{
    (void)stream;
    return cudaMemset(p, value, n);
}

API error_t_ cudaPointerGetAttributes(pointer_attributes_ *a, const void *p)
{
    int device, pinned;
    if (pretend_locate(p, &device, &pinned))
        *a = (pointer_attributes_){2, device, (void *)p, NULL};
    else if (pinned)
        *a = (pointer_attributes_){1, here(), (void *)p, (void *)p};
    else
        *a = (pointer_attributes_){0, -1, NULL, (void *)p};
    return success;
}

