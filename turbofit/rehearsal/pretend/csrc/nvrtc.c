/* Stand-in for libnvrtc: programs compile to nothing, since nothing runs them. Kernels of torch that
 * it compiles when they are first used (products of integers, for one) come through here. */
#define _GNU_SOURCE
#include "account.h"

#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))

enum { success = 0, out_of_memory = 1, invalid_input = 3 };

/* A program remembers the last name that it was asked to keep. */
struct program { char *name; };

API int nvrtcVersion(int *major, int *minor)
{
    *major = PRETEND_CUDA;
    *minor = 0;
    return success;
}

API const char *nvrtcGetErrorString(int error)
{
    return error ? "NVRTC_ERROR" : "NVRTC_SUCCESS";
}

API int nvrtcCreateProgram(struct program **out, const char *source, const char *name, int count,
                           const void *headers, const void *names)
{
    (void)source, (void)name, (void)count, (void)headers, (void)names;
    *out = calloc(1, sizeof **out);
    return *out ? success : out_of_memory;
}

API int nvrtcDestroyProgram(struct program **program)
{
    free((*program)->name);
    free(*program);
    *program = NULL;
    return success;
}

API int nvrtcCompileProgram(struct program *program, int count, const void *options)
{
    (void)program, (void)count, (void)options;
    pretend_called();
    return success;
}

API int nvrtcAddNameExpression(struct program *program, const char *name)
{
    free(program->name);
    program->name = strdup(name);
    return program->name ? success : out_of_memory;
}

API int nvrtcGetLoweredName(struct program *program, const char *name, const char **lowered)
{
    (void)name;
    *lowered = program->name;
    return program->name ? success : invalid_input;
}

static int one(size_t *size)
{
    *size = 1;
    return success;
}

static int empty(char *text)
{
    *text = 0;
    return success;
}

API int nvrtcGetCUBINSize(void *program, size_t *size) { (void)program; return one(size); }
API int nvrtcGetPTXSize(void *program, size_t *size) { (void)program; return one(size); }
API int nvrtcGetProgramLogSize(void *program, size_t *size) { (void)program; return one(size); }
API int nvrtcGetCUBIN(void *program, char *text) { (void)program; return empty(text); }
API int nvrtcGetPTX(void *program, char *text) { (void)program; return empty(text); }
API int nvrtcGetProgramLog(void *program, char *text) { (void)program; return empty(text); }
