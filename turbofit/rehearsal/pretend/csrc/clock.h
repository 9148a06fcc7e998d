/* The time of a pretend card; see clock.c. */
#ifndef TURBOFIT_PRETEND_CLOCK_H
#define TURBOFIT_PRETEND_CLOCK_H

#include "cudart.h"

void clock_register(const void *host_function, const char *device_name);
/* A kernel is launched: where the table knows it, its stream has so much more to do. */
void clock_launch(const void *host_function, void **args, const dim3_ *grid, object_ *stream);
/* A forward is over; so many of its sequences go on. */
void clock_goes_on(int sequences);
/* A stream waits for an event, or an event is recorded on a stream. */
void clock_follow(object_ *after, const object_ *before);
/* Sleeps until the work of a stream or an event is done. */
void clock_wait(const object_ *object);

#endif
