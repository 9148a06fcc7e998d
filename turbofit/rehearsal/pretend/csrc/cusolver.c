/* Stand-in for libcusolver: what Cholesky's steps ask for as workspace, by the answers of libcusolver
 * 12 itself (rows * rows / 256 + 128 bytes of float32). Nothing is factored. */
#include "account.h"

#define API __attribute__((visibility("default")))

static size_t workspace(int64_t rows)
{
    return (size_t)(rows * rows) / 256 + 128;
}

API int cusolverDnXpotrf_bufferSize(void *handle, void *params, int uplo, int64_t rows, int type,
                                    const void *matrix, int64_t stride, int computed,
                                    size_t *device, size_t *host)
{
    (void)handle, (void)params, (void)uplo, (void)type, (void)matrix, (void)stride, (void)computed;
    *device = workspace(rows);
    *host = 0;
    return 0;
}

API int cusolverDnSpotrf_bufferSize(void *handle, int uplo, int rows, void *matrix, int stride,
                                    int *floats)
{
    (void)handle, (void)uplo, (void)matrix, (void)stride;
    *floats = (int)(workspace(rows) / sizeof(float));
    return 0;
}

/* A caller reads there whether the matrix could be factored. Small memory of a card is the host's. */
static int well(int *info)
{
    *info = 0;
    return 0;
}

API int cusolverDnXpotrf(void *handle, void *params, int uplo, int64_t rows, int type, void *matrix,
                         int64_t stride, int computed, void *device, size_t device_bytes, void *host,
                         size_t host_bytes, int *info)
{
    (void)handle, (void)params, (void)uplo, (void)rows, (void)type, (void)matrix, (void)stride;
    (void)computed, (void)device, (void)device_bytes, (void)host, (void)host_bytes;
    return well(info);
}

API int cusolverDnXpotrs(void *handle, void *params, int uplo, int64_t rows, int64_t columns,
                         int type, const void *matrix, int64_t stride, int solved_type, void *solved,
                         int64_t solved_stride, int *info)
{
    (void)handle, (void)params, (void)uplo, (void)rows, (void)columns, (void)type, (void)matrix;
    (void)stride, (void)solved_type, (void)solved, (void)solved_stride;
    return well(info);
}

API int cusolverDnSpotrs(void *handle, int uplo, int rows, int columns, const float *matrix,
                         int stride, float *solved, int solved_stride, int *info)
{
    (void)handle, (void)uplo, (void)rows, (void)columns, (void)matrix, (void)stride, (void)solved;
    (void)solved_stride;
    return well(info);
}
