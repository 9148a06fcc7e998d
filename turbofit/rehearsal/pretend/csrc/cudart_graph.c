/* Stand-in for libcudart, captures and graphs. A captured kernel does not run, and neither does a
 * launched graph; what is allocated meanwhile counts, as in truth. */
#define _GNU_SOURCE
#include "cudart.h"

#include <stdatomic.h>
#include <stdlib.h>

static _Atomic unsigned long long captures;

static object_ *stream_of(void *s) { return (size_t)s <= 2 ? NULL : s; }

API error_t_ cudaStreamBeginCapture(void *s, int mode)
{
    (void)mode;
    if (!stream_of(s)) /* the default stream cannot be captured */
        return give(not_supported);
    pretend_called();
    stream_of(s)->capture = atomic_fetch_add(&captures, 1) + 1;
    return success;
}

API error_t_ cudaStreamBeginCaptureToGraph(void *s, void *graph, const void *nodes,
                                           const void *edges, size_t count, int mode)
{
    (void)graph, (void)nodes, (void)edges, (void)count;
    return cudaStreamBeginCapture(s, mode);
}

API error_t_ cudaStreamEndCapture(void *s, void **graph)
{
    if (!stream_of(s) || !stream_of(s)->capture)
        return give(invalid_value);
    stream_of(s)->capture = 0;
    *graph = malloc(1);
    return *graph ? success : give(no_memory);
}

API error_t_ cudaStreamIsCapturing(void *s, int *status)
{
    *status = stream_of(s) && stream_of(s)->capture ? 1 : 0; /* none, active */
    return success;
}

static error_t_ capture_info(void *s, int *status, unsigned long long *id, void **graph,
                             const void **nodes, size_t *count)
{
    cudaStreamIsCapturing(s, status);
    if (id)
        *id = *status ? stream_of(s)->capture : 0;
    if (graph)
        *graph = *status ? stream_of(s) : NULL;
    if (nodes)
        *nodes = NULL;
    if (count)
        *count = 0;
    return success;
}

#if PRETEND_CUDA == 12
API error_t_ cudaStreamGetCaptureInfo_v2(void *s, int *status, unsigned long long *id,
                                         void **graph, const void **nodes, size_t *count)
{
    return capture_info(s, status, id, graph, nodes, count);
}

API error_t_ cudaStreamUpdateCaptureDependencies(void *s, void *nodes, size_t count, unsigned flags)
{
    (void)s, (void)nodes, (void)count, (void)flags;
    return success;
}
#else
API error_t_ cudaStreamGetCaptureInfo(void *s, int *status, unsigned long long *id, void **graph,
                                      const void **nodes, const void **edges, size_t *count)
{
    if (edges)
        *edges = NULL;
    return capture_info(s, status, id, graph, nodes, count);
}

API error_t_ cudaStreamUpdateCaptureDependencies(void *s, void *nodes, const void *edges,
                                                 size_t count, unsigned flags)
{
    (void)s, (void)nodes, (void)edges, (void)count, (void)flags;
    return success;
}
#endif

API error_t_ cudaThreadExchangeStreamCaptureMode(int *mode)
{
    static __thread int current; /* global */
    int before = current;
    current = *mode;
    *mode = before;
    return success;
}

/* One node, so that nobody takes the graph for an empty one. */
API error_t_ cudaGraphGetNodes(void *graph, void **nodes, size_t *count)
{
    if (nodes && *count)
        nodes[0] = graph;
    *count = 1;
    return success;
}

API error_t_ cudaGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags)
{
    (void)graph, (void)flags;
    *executable = malloc(1);
    return *executable ? success : give(no_memory);
}

API error_t_ cudaGraphLaunch(void *executable, void *s)
{
    (void)executable, (void)s;
    pretend_called();
    return success;
}

API error_t_ cudaGraphExecDestroy(void *executable)
{
    free(executable);
    return success;
}

API error_t_ cudaGraphDestroy(void *graph)
{
    free(graph);
    return success;
}
