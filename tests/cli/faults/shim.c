// Preloaded into the program under test: counts its calls that change files under FAULT_UNDER, and at number FAULT_AT does
// what FAULT_DO says: "kill" the process (of a write, half is done before), from then on answer "ENOSPC" or "EROFS", once "EIO",
// press Ctrl-C ("int") and give it the time to be heard, or "cut" the file FAULT_FILE short and go on. Each call is noted in FAULT_LOG. FAULT_CLOCK: the wall clock jumps.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static atomic_long calls;

static int under(const char *path) {
  const char *root = getenv("FAULT_UNDER");
  if (!root || !path) return 0;
  char whole[2 * PATH_MAX];
  if (path[0] != '/') {
    char here[PATH_MAX];
    if (!getcwd(here, sizeof here)) return 0;
    snprintf(whole, sizeof whole, "%s/%s", here, path);
    path = whole;
  }
  return strncmp(path, root, strlen(root)) == 0;
}

static int under_fd(int fd, char *path) {
  path[0] = 0;
  if (fd <= 2) return 0;  // written from a signal handler too, on a small stack
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, PATH_MAX - 1);
  path[n > 0 ? n : 0] = 0;
  return path[0] == '/' && under(path);  // pipes and sockets are no files
}

static void note(const char *name, const char *path) {
  const char *log = getenv("FAULT_LOG");
  if (!log) return;
  char line[PATH_MAX + 64];
  int n = snprintf(line, sizeof line, "%s %s\n", name, path);
  int fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0644);
  syscall(SYS_write, fd, line, (size_t)n);
  syscall(SYS_close, fd);
}

static void die(void) { syscall(SYS_kill, syscall(SYS_getpid), SIGKILL); }

// The error to answer with, or 0; grows: whether the call needs room. -1: kill now (after half a write).
static int fault(const char *name, const char *path, int grows) {
  note(name, path);
  long n = atomic_fetch_add(&calls, 1) + 1;
  const char *at = getenv("FAULT_AT"), *what = getenv("FAULT_DO");
  if (!at || !what || n < atol(at)) return 0;
  int now = n == atol(at);
  if (now && strcmp(what, "kill") == 0) return -1;
  if (now && strcmp(what, "EIO") == 0) return EIO;
  if (grows && strcmp(what, "ENOSPC") == 0) return ENOSPC;
  if (strcmp(what, "EROFS") == 0) return EROFS;
  if (now && strcmp(what, "int") == 0) {
    syscall(SYS_kill, syscall(SYS_getpid), SIGINT);
    usleep(200000);
  }
  if (now && strcmp(what, "cut") == 0) {
    int fd = syscall(SYS_openat, AT_FDCWD, getenv("FAULT_FILE"), O_WRONLY);
    syscall(SYS_ftruncate, fd, 4096L);
    syscall(SYS_close, fd);
  }
  return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define PATH_FAULT(name, path, grows)                    \
  if (under(path)) {                                     \
    int e = fault(name, path, grows);                    \
    if (e < 0) die();                                    \
    if (e) { errno = e; return -1; }                     \
  }
#define FD_FAULT(name, fd, grows)                        \
  char path_[PATH_MAX];                                  \
  if (under_fd(fd, path_)) {                             \
    int e = fault(name, path_, grows);                   \
    if (e < 0) die();                                    \
    if (e) { errno = e; return -1; }                     \
  }

#define OPEN(name)                                       \
  int name(const char *path, int flags, ...) {           \
    va_list list;                                        \
    va_start(list, flags);                               \
    mode_t mode = va_arg(list, mode_t);                  \
    va_end(list);                                        \
    if (flags & (O_WRONLY | O_RDWR)) PATH_FAULT("open", path, flags & O_CREAT) \
    return REAL(name)(path, flags, mode);                \
  }
OPEN(open)
OPEN(open64)

ssize_t write(int fd, const void *data, size_t size) {
  char path[PATH_MAX];
  if (under_fd(fd, path)) {
    int e = fault("write", path, 1);
    if (e < 0) {
      syscall(SYS_write, fd, data, size / 2);
      die();
    }
    if (e) { errno = e; return -1; }
  }
  return syscall(SYS_write, fd, data, size);
}

int ftruncate(int fd, off_t size) { FD_FAULT("ftruncate", fd, 0) return syscall(SYS_ftruncate, fd, size); }
int ftruncate64(int fd, off64_t size) { FD_FAULT("ftruncate", fd, 0) return syscall(SYS_ftruncate, fd, size); }
int fsync(int fd) { FD_FAULT("fsync", fd, 0) return syscall(SYS_fsync, fd); }
ssize_t copy_file_range(int in, off64_t *a, int out, off64_t *b, size_t n, unsigned flags) {
  FD_FAULT("copy", out, 1)
  return syscall(SYS_copy_file_range, in, a, out, b, n, flags);
}
int rename(const char *from, const char *to) { PATH_FAULT("rename", to, 0) return REAL(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { PATH_FAULT("mkdir", path, 1) return REAL(mkdir)(path, mode); }
int unlink(const char *path) { PATH_FAULT("unlink", path, 0) return REAL(unlink)(path); }
int rmdir(const char *path) { PATH_FAULT("rmdir", path, 0) return REAL(rmdir)(path); }
int unlinkat(int dir, const char *path, int flags) { FD_FAULT("unlinkat", dir, 0) return REAL(unlinkat)(dir, path, flags); }

// Every look at the wall clock is an hour before or after the last one.
int clock_gettime(clockid_t clock, struct timespec *now) {
  int r = syscall(SYS_clock_gettime, clock, now);
  static atomic_long looks;
  if (clock == CLOCK_REALTIME && getenv("FAULT_CLOCK")) now->tv_sec += atomic_fetch_add(&looks, 1) % 2 ? 3600 : -3600;
  return r;
}
