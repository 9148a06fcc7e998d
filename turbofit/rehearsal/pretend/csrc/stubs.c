/* Generated entry points tell their names here, for people who look for what is missing. */
#include "account.h"

#include <stdio.h>
#include <stdlib.h>

void pretend_stub(const char *name)
{
    if (getenv("TURBOFIT_TRACE_STUBS"))
        fprintf(stderr, "turbofit pretend: %s does nothing here\n", name);
}
