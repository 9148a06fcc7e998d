/* The kernels of TurboMind that need an effect. length_criterion_v2: the sampling
 * kernel before it would have advanced the sequences by one token, so it does
 * that too, and then sets `finished` as the real one does. sampling itself:
 * where log probabilities are asked for, each row has one token, 0 with
 * certainty, as every answer here is token 0; with none LMDeploy's Python fails.
 * The real one always counts the token that it chose (kernels/sampling_kernels.cu).
 */
#include "clock.h"
#include "effects.h"

#include <stddef.h>
#include <string.h>

/* sampling<float, 256>, with its parameters: another version's may have others, and has no effect. */
#define SAMPLING "_ZN9turbomind8samplingIfLi256EEEvPKT_iPKiS5_P17curandStateXORWOWS5_PiS8_PS1_S8_S8_"
#define MOST_LOGPROBS 1024 /* utils/constant.h */

static const void *length_criterion, *sampling;

void effect_register(const void *host_function, const char *device_name)
{
    if (device_name && strstr(device_name, "length_criterion_v2"))
        length_criterion = host_function;
    if (device_name && !strcmp(device_name, SAMPLING))
        sampling = host_function;
}

static void sample(void **args, unsigned rows)
{
    float *values = *(float **)args[8];
    int *ids = *(int **)args[9], *counts = *(int **)args[10];
    if (!values || !ids || !counts)
        return;
    for (unsigned i = 0; i < rows; ++i) {
        values[i * MOST_LOGPROBS] = 0;
        ids[i * MOST_LOGPROBS] = 0;
        counts[i] = 1;
    }
}

void effect_run(const void *host_function, void **args, unsigned blocks)
{
    if (host_function && host_function == sampling)
        sample(args, blocks);
    if (!host_function || host_function != length_criterion)
        return;
    unsigned char *finished = *(unsigned char **)args[0];
    int *length = *(int **)args[1];
    const int *limit = *(const int **)args[2];
    int rows = *(int *)args[3], ended = 0;
    for (int i = 0; i < rows; ++i)
        if (++length[i] >= limit[i])
            ended += finished[i] = 1;
    clock_goes_on(rows - ended);
}
