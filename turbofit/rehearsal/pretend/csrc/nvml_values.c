/* What the NVML stand-in's machine is: the pretend machine of the account (every process of it, in
 * the shared file), or where NVML_STANDIN_SCENARIO names a file, what that says. The file has one
 * "key value" a line (tests/support/nvml.py writes it) and is read again on every call, so that a
 * test can change the machine in flight; without the file there is no driver. */
#include "machine.h"
#include "nvml.h"

#include <stdarg.h>

#define MOST_PROCESSES 512

static const char *scripted(char out[TEXT], const char *key, const char *path)
{
    char line[TEXT];
    size_t length = strlen(key);
    FILE *file = fopen(path, "r");
    const char *found = NULL;
    while (file && !found && fgets(line, sizeof line, file))
        if (!strncmp(line, key, length) && line[length] == ' ') {
            line[strcspn(line, "\n")] = 0;
            snprintf(out, TEXT, "%s", line + length + 1);
            found = out;
        }
    if (file)
        fclose(file);
    return found;
}

/* ---------------------------------------------------------- the account */

static const char *put_number(char out[TEXT], u64 value)
{
    snprintf(out, TEXT, "%llu", value);
    return out;
}

static const char *compute(char out[TEXT], int gpu, const char *key)
{
    struct machine_process rows[MOST_PROCESSES];
    u32 wanted;
    u64 sum = machine_device(gpu)->used;
    int count = machine_processes(gpu, rows, MOST_PROCESSES);
    count = count < MOST_PROCESSES ? count : MOST_PROCESSES;
    if (!strcmp(key, "compute"))
        return put_number(out, (u64)count);
    if (sscanf(key, "compute.%u", &wanted) == 1) {
        if (wanted >= (u32)count)
            return NULL;
        snprintf(out, TEXT, "%d %zu", rows[wanted].pid, rows[wanted].bytes);
        return out;
    }
    for (int i = 0; i < count; ++i)
        sum += rows[i].bytes;
    u64 total = machine_device(gpu)->total;
    return put_number(out, sum < total ? sum : total);
}

static const char *of_gpu(char out[TEXT], int gpu, const char *key)
{
    const struct pretend_device *d = machine_device(gpu);
    if (!d)
        return NULL;
    if (!strcmp(key, "name"))
        snprintf(out, TEXT, "%s", d->name);
    else if (!strcmp(key, "uuid"))
        machine_uuid_text(gpu, out);
    else if (!strcmp(key, "total"))
        put_number(out, d->total + d->reserved);
    else if (!strcmp(key, "reserved"))
        put_number(out, d->reserved);
    else if (!strcmp(key, "cc"))
        put_number(out, (u64)(d->major * 10 + d->minor));
    else if (!strcmp(key, "used") || !strncmp(key, "compute", 7))
        return compute(out, gpu, key);
    else
        return NULL;
    return out;
}

/* The program of a process, as a driver names it. */
static const char *program(char out[TEXT], int pid)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/cmdline", pid);
    FILE *file = fopen(path, "r");
    size_t n = file ? fread(out, 1, TEXT - 1, file) : 0;
    if (file)
        fclose(file);
    out[n] = 0;
    return n ? out : NULL;
}

static const char *accounted_for(char out[TEXT], const char *key)
{
    int a, b, at = 0;
    if (!getenv("TURBOFIT_PRETEND_SCENARIO"))
        return NULL;
    if (!strcmp(key, "gpus"))
        return machine_count() ? put_number(out, (u64)machine_count()) : NULL;
    if (sscanf(key, "gpu.%d.%n", &a, &at) == 1 && at)
        return of_gpu(out, a, key + at);
    if (sscanf(key, "p2p.%d.%d", &a, &b) == 2)
        return strcpy(out, machine_reaches(a, b) ? "0 0 5" : "5 5 5");
    if (sscanf(key, "process.%d", &a) == 1)
        return program(out, a);
    if (!strcmp(key, "driver"))
        return strcpy(out, "580.65.06");
    return !strcmp(key, "cuda") ? strcpy(out, "13000") : NULL;
}

const char *nvml_value(char out[TEXT], const char *format, ...)
{
    char key[TEXT];
    const char *path = getenv("NVML_STANDIN_SCENARIO");
    va_list args;
    va_start(args, format);
    vsnprintf(key, sizeof key, format, args);
    va_end(args);
    return path ? scripted(out, key, path) : accounted_for(out, key);
}
