/* What launches still do: the effects of a few kernels, so that the engine's control flow goes on. */
#ifndef TURBOFIT_PRETEND_EFFECTS_H
#define TURBOFIT_PRETEND_EFFECTS_H

void effect_register(const void *host_function, const char *device_name);
void effect_run(const void *host_function, void **args, unsigned blocks);

#endif
