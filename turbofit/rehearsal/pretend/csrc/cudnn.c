/* Stand-in for libcudnn 9: its graph interface, as far as finding one engine for an operation goes.
 *
 * A descriptor remembers nothing. Heuristics answer with one engine configuration; a plan needs no
 * workspace, which is under: real plans take some.
 */
#include "account.h"

#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))

enum { success = 0 };
/* cudnnBackendAttributeName_t, as far as they are asked for */
enum { heuristic_results = 202, plan_workspace = 402, plan_engine = 401 };
/* cudnnBackendAttributeType_t */
enum { type_int64 = 3, type_descriptor = 15 };

API size_t cudnnGetVersion(void) { return 92000; }
API size_t cudnnGetCudartVersion(void) { return 13000; }
API const char *cudnnGetErrorString(int status)
{
    return status ? "CUDNN_STATUS_NOT_SUPPORTED" : "CUDNN_STATUS_SUCCESS";
}

API void cudnnGetLastErrorString(char *text, size_t size)
{
    if (size)
        *text = 0;
}

API int cudnnCreate(void **handle)
{
    pretend_called();
    *handle = malloc(1);
    return *handle ? success : 2002; /* CUDNN_STATUS_ALLOC_FAILED */
}

API int cudnnDestroy(void *handle)
{
    free(handle);
    return success;
}

API int cudnnGetStream(void *handle, void **stream)
{
    (void)handle;
    *stream = NULL;
    return success;
}

API int cudnnBackendCreateDescriptor(int kind, void **out)
{
    (void)kind;
    *out = malloc(1);
    return *out ? success : 2002;
}

API int cudnnBackendDestroyDescriptor(void *descriptor)
{
    free(descriptor);
    return success;
}

API int cudnnBackendGetAttribute(void *descriptor, int name, int type, int64_t wanted,
                                 int64_t *count, void *values)
{
    (void)descriptor;
    int64_t found = 0;
    if (name == heuristic_results || name == plan_engine)
        found = 1; /* the caller made the descriptors that would be filled in */
    else if (type == type_int64 && wanted > 0 && values) {
        memset(values, 0, (size_t)wanted * sizeof(int64_t));
        found = name == plan_workspace ? 1 : 0;
    }
    if (count)
        *count = found;
    return success;
}
