/* Stand-in for libcublas: handles without memory, products that are not computed. What is not here
 * and returns nothing but a status is generated (../build.py). */
#include "account.h"

#include <stdlib.h>

#define API __attribute__((visibility("default")))

API int cublasCreate_v2(void **handle)
{
    pretend_called();
    *handle = malloc(1);
    return *handle ? 0 : 3; /* CUBLAS_STATUS_ALLOC_FAILED */
}

API int cublasDestroy_v2(void *handle)
{
    free(handle);
    return 0;
}

API int cublasSetStream_v2(void *handle, void *stream)
{
    (void)handle;
    (void)stream;
    return 0;
}

API int cublasSetWorkspace_v2(void *handle, void *workspace, size_t size)
{
    (void)handle;
    (void)workspace;
    (void)size;
    return 0;
}

API int cublasGetMathMode(void *handle, int *mode)
{
    (void)handle;
    *mode = 0;
    return 0;
}

API int cublasGetPointerMode_v2(void *handle, int *mode)
{
    (void)handle;
    *mode = 0; /* host */
    return 0;
}

API int cublasGemmEx(void)
{
    pretend_called();
    return 0;
}

API int cublasGemmGroupedBatchedEx(void) { return cublasGemmEx(); }

API int cublasSetMathMode(void) { return 0; }
