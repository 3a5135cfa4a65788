/* The C interface, for other languages: one handle per opened bundle, one per answer, a status from every call.
 *
 * Strings are UTF-8. A handle is closed once; closing NULL does nothing. Threads may share a runtime, but nobody may use
 * one that is being closed. What went wrong last on a thread: variator_last_error. */
#ifndef VARIATOR_VARIATOR_H
#define VARIATOR_VARIATOR_H

#include <stddef.h>
#include <stdint.h>

#include "variator/export.h"
#include "variator/version.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Raised when a function or a field changes its meaning. */
#define VARIATOR_ABI 1

typedef enum variator_status {
  VARIATOR_OK = 0,
  VARIATOR_INPUT_ERROR = 1,
  VARIATOR_BUNDLE_ERROR = 2,
  VARIATOR_ENGINE_ERROR = 3,
  VARIATOR_DEADLINE_EXCEEDED = 4,
  VARIATOR_OVERLOADED = 5,
  VARIATOR_FAILED = 6 /* anything else: out of memory */
} variator_status;

typedef struct variator_runtime variator_runtime;
typedef struct variator_result variator_result;

/* How a bundle is opened; fill it with variator_open_defaults. */
typedef struct variator_open_options {
  const char* engine;    /* "auto", or a backend's name */
  const char* precision; /* "" takes the fastest without int8's loss */
  int threads;           /* 0 means all cores */
  int verify;            /* whether every file of the bundle is hashed */
  const char* policy;    /* for ratio "auto" */
  double slo_ms;         /* for ratio "auto" */
  int max_queue;         /* requests with ratio "auto" that may wait */
} variator_open_options;

/* One output of a result: fp32 values, row by row; memory of the result. */
typedef struct variator_tensor {
  const char* name;
  const float* values;
  const int64_t* shape;
  size_t dimensions;
} variator_tensor;

/* What a result says beside its outputs; memory of the result. */
typedef struct variator_about {
  const char* ratio;
  const char* engine;
  const char* precision;
  size_t outputs;
  double load_ms, queue_ms, compute_ms;
  double expected_quality; /* relative to ratio 1; 0 if it is not known */
} variator_about;

/* VARIATOR_ABI and the version of the library that was loaded. */
VARIATOR_EXPORT int variator_abi(void);
VARIATOR_EXPORT const char* variator_version(void);

/* What went wrong last on this thread: what, what is valid, the fix, a line each. "" if nothing has. */
VARIATOR_EXPORT const char* variator_last_error(void);

VARIATOR_EXPORT void variator_open_defaults(variator_open_options* options);

/* Open a bundle. `options` may be NULL. */
VARIATOR_EXPORT variator_status variator_open(const char* bundle, const variator_open_options* options,
                                              variator_runtime** runtime);
VARIATOR_EXPORT void variator_close(variator_runtime* runtime);

/* The ratios of a bundle, apart by blanks: "1 2 4"; memory of the runtime. */
VARIATOR_EXPORT const char* variator_ratios(const variator_runtime* runtime);

/* Run a request.
 *
 * ids:     token ids of all rows, one after another
 * types:   their token types, 0 or 1; NULL means all 0
 * lengths: tokens of each row, `rows` of them
 * ratio:   "4", the name of a setting, or "auto"
 * slo_ms:  for "auto", ms from call to answer; 0 takes that of the options */
VARIATOR_EXPORT variator_status variator_infer(variator_runtime* runtime, const int64_t* ids, const int64_t* types,
                                               const size_t* lengths, size_t rows, const char* ratio, double slo_ms,
                                               variator_result** result);
VARIATOR_EXPORT void variator_about_result(const variator_result* result, variator_about* about);
VARIATOR_EXPORT variator_status variator_output(const variator_result* result, size_t index, variator_tensor* tensor);
VARIATOR_EXPORT void variator_result_close(variator_result* result);

#ifdef __cplusplus
}
#endif

#endif
