# What is compiled calls these, by the names of syscalls.py: they are all that is written twice. They keep the
# interpreter's lock, because they do not wait.
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_SetFromErrno

cdef extern from *:
    """
    #include <sys/types.h>
    #include <sys/socket.h>
    #ifdef __linux__
    #include <sys/epoll.h>
    #else  /* nobody calls it */
    struct epoll_event { unsigned int events; struct { int fd; } data; };
    static int epoll_wait(int fd, struct epoll_event *events, int most, int wait) { return 0; }
    #endif
    #ifndef MSG_NOSIGNAL
    #define MSG_NOSIGNAL 0
    #endif
    static char cenote_scratch[262144];  /* the lock keeps others away from it */
    """
    char cenote_scratch[262144]
    int MSG_NOSIGNAL
    ctypedef struct epoll_data:
        int fd
    struct epoll_event:
        unsigned int events
        epoll_data data
    int epoll_wait(int fd, epoll_event *events, int most, int wait)
    Py_ssize_t recv(int fd, void *into, size_t most, int flags)
    Py_ssize_t c_send "send"(int fd, const void *data, size_t size, int flags)


cdef inline bytes receive(object sock, int fd):
    cdef Py_ssize_t got = recv(fd, cenote_scratch, sizeof(cenote_scratch), 0)
    if got < 0:
        PyErr_SetFromErrno(OSError)
    return PyBytes_FromStringAndSize(cenote_scratch, got)


cdef inline Py_ssize_t send(object sock, int fd, bytes data) except -1:
    cdef Py_ssize_t sent = c_send(fd, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), MSG_NOSIGNAL)
    if sent < 0:
        PyErr_SetFromErrno(OSError)
    return sent


cdef inline list ready(object epoll, int fd):
    cdef epoll_event events[256]
    cdef int i, n = epoll_wait(fd, events, 256, 0)
    if n < 0:
        PyErr_SetFromErrno(OSError)
    return [(events[i].data.fd, events[i].events) for i in range(n)]
