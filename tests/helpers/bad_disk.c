/* A disk that fails for one process: LD_PRELOAD it.

   POTLUCK_BAD_DISK names a file. While it is there, reads, writes and syncs of files whose paths
   begin with its second word fail with the error number that is its first. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int is_bad(int file, int reads)
{
    const char *flag = getenv("POTLUCK_BAD_DISK");
    char told[2048], link[64], path[2048], start[2048];
    int number, saved = errno;
    int from = flag ? syscall(SYS_openat, AT_FDCWD, flag, O_RDONLY | O_CLOEXEC) : -1;
    errno = saved;
    if (from < 0)
        return 0;
    long got = syscall(SYS_read, from, told, sizeof told - 1);
    syscall(SYS_close, from);
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    long length = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (got <= 0 || length <= 0)
        return 0;
    told[got] = path[length] = 0;
    if (sscanf(told, "%d %2047s", &number, start) != 2 || strncmp(path, start, strlen(start)))
        return 0;
    if (reads && number != EIO) /* a full disk and a read-only one can be read */
        return 0;
    errno = number;
    return 1;
}

ssize_t write(int file, const void *from, size_t count)
{
    return is_bad(file, 0) ? -1 : syscall(SYS_write, file, from, count);
}

ssize_t pwrite(int file, const void *from, size_t count, off_t offset)
{
    return is_bad(file, 0) ? -1 : syscall(SYS_pwrite64, file, from, count, offset);
}

ssize_t pwrite64(int file, const void *from, size_t count, off_t offset)
{
    return pwrite(file, from, count, offset);
}

ssize_t read(int file, void *to, size_t count)
{
    return is_bad(file, 1) ? -1 : syscall(SYS_read, file, to, count);
}

ssize_t pread(int file, void *to, size_t count, off_t offset)
{
    return is_bad(file, 1) ? -1 : syscall(SYS_pread64, file, to, count, offset);
}

ssize_t pread64(int file, void *to, size_t count, off_t offset)
{
    return pread(file, to, count, offset);
}

int fsync(int file)
{
    return is_bad(file, 0) ? -1 : syscall(SYS_fsync, file);
}

int fdatasync(int file)
{
    return is_bad(file, 0) ? -1 : syscall(SYS_fdatasync, file);
}
