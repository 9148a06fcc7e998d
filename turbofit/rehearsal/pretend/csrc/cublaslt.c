/* Stand-in for libcublasLt: descriptions that nobody reads, and a heuristic that always knows one
 * way, which needs no workspace. */
#include "account.h"

#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))

/* cublasLtMatmulHeuristicResult_t */
typedef struct {
    uint64_t algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
} result_;
_Static_assert(sizeof(result_) == 96, "cublasLtMatmulHeuristicResult_t");

static int make(void **out)
{
    *out = malloc(1);
    return *out ? 0 : 3; /* CUBLAS_STATUS_ALLOC_FAILED */
}

static int drop(void *p)
{
    free(p);
    return 0;
}

API int cublasLtCreate(void **handle) { return make(handle); }
API int cublasLtDestroy(void *handle) { return drop(handle); }
API int cublasLtMatmulDescCreate(void **out) { return make(out); }
API int cublasLtMatmulDescDestroy(void *p) { return drop(p); }
API int cublasLtMatrixLayoutCreate(void **out) { return make(out); }
API int cublasLtMatrixLayoutDestroy(void *p) { return drop(p); }
API int cublasLtMatmulPreferenceCreate(void **out) { return make(out); }
API int cublasLtMatmulPreferenceDestroy(void *p) { return drop(p); }

API int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c,
                                       void *d, void *preference, int wanted, result_ *results,
                                       int *count)
{
    (void)handle, (void)operation, (void)a, (void)b, (void)c, (void)d, (void)preference;
    *count = wanted > 0;
    if (*count)
        memset(results, 0, sizeof *results);
    return 0;
}

API size_t cublasLtGetVersion(void) { return 130100; }
