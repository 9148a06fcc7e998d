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
