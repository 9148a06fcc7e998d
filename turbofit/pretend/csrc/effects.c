/* The one kernel of TurboMind that needs an effect: length_criterion_v2. The
 * sampling kernel before it would have advanced the sequences by one token, so
 * it does that too, and then sets `finished` as the real one does.
 */
#include "effects.h"

#include <stddef.h>
#include <string.h>

static const void *length_criterion;

void effect_register(const void *host_function, const char *device_name)
{
    if (device_name && strstr(device_name, "length_criterion_v2"))
        length_criterion = host_function;
}

void effect_run(const void *host_function, void **args)
{
    if (!host_function || host_function != length_criterion)
        return;
    unsigned char *finished = *(unsigned char **)args[0];
    int *length = *(int **)args[1];
    const int *limit = *(const int **)args[2];
    int rows = *(int *)args[3];
    for (int i = 0; i < rows; ++i)
        if (++length[i] >= limit[i])
            finished[i] = 1;
}
