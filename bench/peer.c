/* Both ends of the balancer's bench: a server and the loads that wrk has not. Linux; compiled by bench/peer.py.

   peer serve PORT                               on loopback; runs until standard input is closed
   peer latency PORT RATE SECONDS CONNECTIONS    requests at fixed times, each answer's time from when it was due
   peer burst PORT COUNT SECONDS                 so many connections at once, a request on each, until all are answered
   peer bulk PORT down|up STREAMS BYTES SECONDS  bytes over all streams together
   peer hold PORT COUNT SECONDS                  connections that have exchanged something and then say nothing, until
                                                 standard input is closed

   A connection begins with `G` (an HTTP request; answers until Connection: close), or with `D` or `U` and 16 hexadecimal
   digits: so many bytes down, then the end; or up, answered with one byte. Results are one line of JSON; whatever goes
   wrong is told on standard error, and the exit code is 1. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BATCH 256
#define HEAD_BYTES 2048
#define CHUNK (1 << 20)
#define ORDER_BYTES 17

static const char ANSWER[] = "HTTP/1.1 200 OK\r\nServer: peer\r\nContent-Type: text/plain\r\nContent-Length: 14\r\n\r\nHello, world!\n";
static const char LAST[] =
    "HTTP/1.1 200 OK\r\nServer: peer\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: 14\r\n\r\nHello, world!\n";
static const char REQUEST[] = "GET / HTTP/1.1\r\nHost: bench\r\n\r\n";

enum kind { FRESH, HTTP, DOWN, UP };
struct end {
    int fd, used;
    enum kind kind;
    uint64_t left;
    char head[HEAD_BYTES];
};
static int loop_fd, zeros_fd;
static char sink[CHUNK];

static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec + at.tv_nsec / 1e9;
}

static void set_up(void) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    signal(SIGPIPE, SIG_IGN);
    loop_fd = epoll_create1(EPOLL_CLOEXEC);
    zeros_fd = memfd_create("zeros", MFD_CLOEXEC);
    if (loop_fd < 0 || zeros_fd < 0 || ftruncate(zeros_fd, CHUNK) < 0) die("set-up: %s", strerror(errno));
    memset(sink, 'z', sizeof sink);
    if (pwrite(zeros_fd, sink, CHUNK, 0) != CHUNK) die("memory file: %s", strerror(errno));
}

static void watch(struct end *one, uint32_t events, int operation) {
    struct epoll_event event = {.events = events, .data.ptr = one};
    if (epoll_ctl(loop_fd, operation, one->fd, &event) < 0) die("epoll_ctl: %s", strerror(errno));
}

static struct end *new_end(int fd) {
    int on = 1;
    struct end *one = calloc(1, sizeof *one);
    if (!one) die("no memory");
    one->fd = fd;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return one;
}

/* Begins to connect; writable when it is done. */
static struct end *begin_connect(int port) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) die("socket: %s", strerror(errno));
    if (connect(fd, (struct sockaddr *)&to, sizeof to) < 0 && errno != EINPROGRESS) die("connect: %s", strerror(errno));
    return new_end(fd);
}

static void say(struct end *one, const void *text, size_t size) {
    if (send(one->fd, text, size, MSG_NOSIGNAL) != (ssize_t)size) die("send: %s", strerror(errno));
}

/* --- the server --------------------------------------------------------------------------------------------------- */

static void drop(struct end *one) {
    close(one->fd);
    free(one);
}

/* Sends until the kernel takes no more. Returns 1 when all is sent, -1 when the connection is gone. */
static int give(struct end *one) {
    while (one->left) {
        off_t from = 0;
        ssize_t sent = sendfile(one->fd, zeros_fd, &from, one->left < CHUNK ? one->left : CHUNK);
        if (sent < 0) return errno == EAGAIN ? 0 : -1;
        one->left -= sent;
    }
    return 1;
}

/* Discards what comes: with MSG_TRUNC it is not even copied (tcp(7)). Returns 1 at the end of it, -1 as above. */
static int take(struct end *one) {
    while (one->left) {
        ssize_t got = recv(one->fd, sink, one->left < CHUNK ? one->left : CHUNK, MSG_TRUNC);
        if (got < 0) return errno == EAGAIN ? 0 : -1;
        if (got == 0) return -1;
        one->left -= got;
    }
    return 1;
}

/* Answers each whole request. Returns -1 when the connection is to be closed. */
static int answer(struct end *one) {
    ssize_t got = recv(one->fd, one->head + one->used, HEAD_BYTES - one->used, 0);
    if (got <= 0) return got < 0 && errno == EAGAIN ? 0 : -1;
    one->used += got;
    char *stop;
    while ((stop = memmem(one->head, one->used, "\r\n\r\n", 4))) {
        int size = stop + 4 - one->head;
        int is_last = memmem(one->head, size, "onnection: close", 16) != NULL;
        size_t length = is_last ? sizeof LAST - 1 : sizeof ANSWER - 1;
        if (send(one->fd, is_last ? LAST : ANSWER, length, MSG_NOSIGNAL) != (ssize_t)length || is_last) return -1;
        memmove(one->head, one->head + size, one->used - size);
        one->used -= size;
    }
    return one->used == HEAD_BYTES ? -1 : 0;
}

/* The first bytes say what the connection is for. Returns -1 when it is to be closed. */
static int begin(struct end *one) {
    ssize_t got = recv(one->fd, one->head, ORDER_BYTES, MSG_PEEK);
    if (got <= 0) return got < 0 && errno == EAGAIN ? 0 : -1;
    if (one->head[0] == 'G') {
        one->kind = HTTP;
        return answer(one);
    }
    if (got < ORDER_BYTES) return 0;
    one->kind = one->head[0] == 'D' ? DOWN : UP;
    if (recv(one->fd, one->head, ORDER_BYTES, 0) != ORDER_BYTES) return -1;
    one->head[ORDER_BYTES] = 0;
    one->left = strtoull(one->head + 1, NULL, 16);
    if (one->kind == DOWN) watch(one, EPOLLOUT, EPOLL_CTL_MOD);
    return 0;
}

static void serve_one(struct end *one) {
    int done = 0;
    if (one->kind == FRESH)
        done = begin(one);
    else if (one->kind == HTTP)
        done = answer(one);
    else if (one->kind == DOWN)
        done = give(one);
    else if ((done = take(one)) == 1)
        send(one->fd, "k", 1, MSG_NOSIGNAL);
    if (done) drop(one);
}

static void serve(int port) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof at;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&at, size) < 0 || listen(listener, 4096) < 0) die("listen: %s", strerror(errno));
    struct end doors = {.fd = listener}, input = {.fd = 0};
    watch(&doors, EPOLLIN, EPOLL_CTL_ADD);
    watch(&input, EPOLLIN, EPOLL_CTL_ADD);
    getsockname(listener, (struct sockaddr *)&at, &size);
    printf("{\"port\": %d}\n", ntohs(at.sin_port));
    fflush(stdout);
    struct epoll_event events[BATCH];
    for (;;) {
        int count = epoll_wait(loop_fd, events, BATCH, -1);
        for (int i = 0; i < count; i++) {
            struct end *one = events[i].data.ptr;
            if (one == &input) return;
            if (one != &doors) {
                serve_one(one);
                continue;
            }
            int fd;
            while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0)
                watch(new_end(fd), EPOLLIN, EPOLL_CTL_ADD);
        }
    }
}

/* --- the loads ---------------------------------------------------------------------------------------------------- */

/* Whether the whole answer is there. */
static int is_answered(struct end *one) {
    ssize_t got = recv(one->fd, one->head + one->used, HEAD_BYTES - one->used, 0);
    if (got < 0 && errno == EAGAIN) return 0;
    if (got <= 0) die("an answer ended early: %s", got < 0 ? strerror(errno) : "closed");
    one->used += got;
    if (one->used < (int)sizeof ANSWER - 1) return 0;
    if (one->used != sizeof ANSWER - 1 || memcmp(one->head, ANSWER, one->used)) die("a wrong answer");
    one->used = 0;
    return 1;
}

/* Opens so many, asks each once; returns when all are answered. They stay open, watched for input. */
static struct end **open_all(int port, int count, double deadline) {
    struct end **all = calloc(count, sizeof *all);
    struct epoll_event events[BATCH];
    int left = count;
    for (int i = 0; i < count; i++) {
        all[i] = begin_connect(port);
        watch(all[i], EPOLLOUT, EPOLL_CTL_ADD);
    }
    while (left) {
        int wait = (deadline - now()) * 1000;
        if (wait <= 0) die("%d of %d were not answered in time", left, count);
        int found = epoll_wait(loop_fd, events, BATCH, wait);
        for (int i = 0; i < found; i++) {
            struct end *one = events[i].data.ptr;
            if (one->kind == FRESH) {
                one->kind = HTTP;
                watch(one, EPOLLIN, EPOLL_CTL_MOD);
                say(one, REQUEST, sizeof REQUEST - 1);
            } else if (is_answered(one)) {
                left--;
            }
        }
    }
    return all;
}

static void burst(int port, int count, double seconds) {
    double began = now();
    open_all(port, count, began + seconds);
    printf("{\"seconds\": %.6f, \"count\": %d}\n", now() - began, count);
}

static void hold(int port, int count, double seconds) {
    double deadline = now() + seconds;
    for (int done = 0; done < count; done += 500) open_all(port, count - done < 500 ? count - done : 500, deadline);
    printf("{\"held\": %d}\n", count);
    fflush(stdout);
    struct end input = {.fd = 0};
    watch(&input, EPOLLIN, EPOLL_CTL_ADD);
    struct epoll_event event;
    while (deadline > now())
        if (epoll_wait(loop_fd, &event, 1, (deadline - now()) * 1000 + 1) == 1) {
            if (event.data.ptr == &input) return;
            die("a connection that was idle ended");
        }
    die("held for too long");
}

static int by_value(const void *one, const void *other) {
    double left = *(const double *)one, right = *(const double *)other;
    return (left > right) - (left < right);
}

/* Connection i is asked at times i, i + connections, … of the schedule, or when its last answer is there. */
static void latency(int port, int rate, double seconds, int connections) {
    int total = rate * seconds, asked = 0, answered = 0;
    double *took = calloc(total, sizeof *took), *due = calloc(connections, sizeof *due);
    struct end **all = open_all(port, connections, now() + 10);
    struct epoll_event events[BATCH];
    for (int i = 0; i < connections; i++) all[i]->left = i;
    double began = now() + 0.01, deadline = began + seconds + 10;
    while (answered < total) {
        double at = began + (double)asked / rate, wait = asked < total ? at - now() : 1;
        if (now() > deadline) die("%d of %d were not answered in time", total - answered, total);
        if (asked < total && wait <= 0 && due[asked % connections] == 0) {
            due[asked % connections] = at;
            say(all[asked % connections], REQUEST, sizeof REQUEST - 1);
            asked++;
            continue;
        }
        struct timespec pause = {0, wait > 0 ? (wait < 0.9 ? wait * 1e9 : 9e8) : 1e8};
        int found = epoll_pwait2(loop_fd, events, BATCH, &pause, NULL);
        for (int i = 0; i < found; i++) {
            struct end *one = events[i].data.ptr;
            if (!is_answered(one)) continue;
            took[answered++] = now() - due[one->left];
            due[one->left] = 0;
        }
    }
    qsort(took, total, sizeof *took, by_value);
    printf("{\"count\": %d, \"p50_us\": %.1f, \"p99_us\": %.1f, \"max_us\": %.1f}\n", total, took[total / 2] * 1e6,
           took[total * 99 / 100] * 1e6, took[total - 1] * 1e6);
}

static void bulk(int port, int is_down, int streams, uint64_t bytes, double seconds) {
    double began = now(), deadline = began + seconds;
    int left = streams;
    struct epoll_event events[BATCH];
    char order[ORDER_BYTES + 1];
    for (int i = 0; i < streams; i++) {
        struct end *one = begin_connect(port);
        one->left = bytes / streams;
        watch(one, EPOLLOUT, EPOLL_CTL_ADD);
    }
    while (left) {
        int wait = (deadline - now()) * 1000;
        if (wait <= 0) die("%d of %d streams did not end in time", left, streams);
        int found = epoll_wait(loop_fd, events, BATCH, wait);
        for (int i = 0; i < found; i++) {
            struct end *one = events[i].data.ptr;
            if (one->kind == FRESH) {
                one->kind = is_down ? DOWN : UP;
                snprintf(order, sizeof order, "%c%016llx", is_down ? 'D' : 'U', (unsigned long long)one->left);
                say(one, order, ORDER_BYTES);
                if (is_down) watch(one, EPOLLIN, EPOLL_CTL_MOD);
            } else if (!is_down && one->left) {
                if (give(one) < 0) die("upload: %s", strerror(errno));
                if (!one->left) watch(one, EPOLLIN, EPOLL_CTL_MOD);
            } else {
                if (is_down && one->left && take(one) < 0) die("%llu bytes are missing", (unsigned long long)one->left);
                if (is_down && one->left) continue;
                ssize_t last = recv(one->fd, sink, 1, 0);  /* the end, or the byte that says that all has arrived */
                if (last < 0 && errno == EAGAIN) continue;
                if (last != !is_down) die("a stream ended wrongly");
                left--;
                drop(one);
            }
        }
    }
    printf("{\"seconds\": %.6f, \"bytes\": %llu}\n", now() - began, (unsigned long long)(bytes / streams * streams));
}

int main(int count, char **words) {
    set_up();
    if (count == 3 && !strcmp(words[1], "serve"))
        serve(atoi(words[2]));
    else if (count == 6 && !strcmp(words[1], "latency"))
        latency(atoi(words[2]), atoi(words[3]), atof(words[4]), atoi(words[5]));
    else if (count == 5 && !strcmp(words[1], "burst"))
        burst(atoi(words[2]), atoi(words[3]), atof(words[4]));
    else if (count == 7 && !strcmp(words[1], "bulk"))
        bulk(atoi(words[2]), !strcmp(words[3], "down"), atoi(words[4]), strtoull(words[5], NULL, 10), atof(words[6]));
    else if (count == 5 && !strcmp(words[1], "hold"))
        hold(atoi(words[2]), atoi(words[3]), atof(words[4]));
    else
        die("usage: see the head of bench/peer.c");
    return 0;
}
