// A clock of the day that jumps: preload it, and the 8 bytes of the file $JUMP_OFFSET are seconds that are added to it.
//
// Only the clock of the day is another one. Durations are as they are: what waits until a time of the day by this clock
// waits as long as it meant to. Each use reads the offset, so that a running process sees a jump at once.
//
//     cc -shared -fPIC -O1 -o jump.so bench/jump.c

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *shared;

__attribute__((constructor)) static void map_offset(void) {
  const char *path = getenv("JUMP_OFFSET");
  int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (fd < 0) return;
  void *where = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, fd, 0);
  if (where != MAP_FAILED) shared = where;
  close(fd);
}

static int64_t offset(void) { return shared ? *shared : 0; }

static long kernel(long number, long a, long b, long c, long d, long e, long f) {
#if defined(__x86_64__)
  long result;
  register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                   : "rcx", "r11", "memory");
#else
  register long result __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c, x3 __asm__("x3") = d;
  register long x4 __asm__("x4") = e, x5 __asm__("x5") = f, x8 __asm__("x8") = number;
  __asm__ volatile("svc 0" : "+r"(result) : "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5), "r"(x8) : "memory");
#endif
  if (result < 0 && result > -4096) {
    errno = (int)-result;
    return -1;
  }
  return result;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  int result = (int)kernel(SYS_clock_gettime, clock, (long)now, 0, 0, 0, 0);
  if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += offset();
  return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  struct timespec fine;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &fine);
  now->tv_sec = fine.tv_sec;
  now->tv_usec = fine.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *kept) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (kept) *kept = now.tv_sec;
  return now.tv_sec;
}

// The kernel's time for a time of this clock. A machine is not up for 30 years: other times are of a monotonic clock.
static struct timespec real(const struct timespec *until) {
  struct timespec then = *until;
  if (then.tv_sec > 1000000000) then.tv_sec -= offset();
  return then;
}

static void *next(const char *name) {
  void *found = dlvsym(RTLD_NEXT, name, "GLIBC_2.3.2");  // conditions of x86-64 have an older version, too
  return found ? found : dlsym(RTLD_NEXT, name);
}

#define WAITS(name, parameters, arguments)                \
  int name parameters {                                   \
    static int(*call) parameters;                         \
    struct timespec then = real(until);                   \
    if (!call) call = (int(*) parameters)next(#name);     \
    return call arguments;                                \
  }

WAITS(pthread_cond_timedwait,
      (pthread_cond_t *restrict one, pthread_mutex_t *restrict lock, const struct timespec *restrict until),
      (one, lock, &then))
WAITS(pthread_cond_clockwait,
      (pthread_cond_t *restrict one, pthread_mutex_t *restrict lock, clockid_t clock,
       const struct timespec *restrict until),
      (one, lock, clock, &then))
WAITS(pthread_mutex_timedlock, (pthread_mutex_t *restrict lock, const struct timespec *restrict until), (lock, &then))
WAITS(sem_timedwait, (sem_t *restrict one, const struct timespec *restrict until), (one, &then))
WAITS(sem_clockwait, (sem_t *restrict one, clockid_t clock, const struct timespec *restrict until), (one, clock, &then))

long syscall(long number, ...) {  // Abseil waits on a futex of its own
  va_list given;
  long a[6];
  va_start(given, number);
  for (int i = 0; i < 6; i++) a[i] = va_arg(given, long);
  va_end(given);
  if (number == SYS_futex && (a[1] & FUTEX_CLOCK_REALTIME) && a[3]) {
    struct timespec then = real((const struct timespec *)a[3]);
    return kernel(number, a[0], a[1], a[2], (long)&then, a[4], a[5]);
  }
  return kernel(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
