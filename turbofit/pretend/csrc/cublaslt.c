/* Stand-in for libcublasLt.so.12: TurboMind names the library and calls nothing of it. */
__attribute__((visibility("default"))) const char turbofit_pretend_cublaslt[] = "pretend";
