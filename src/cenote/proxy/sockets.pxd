cimport cython
from cenote.proxy cimport syscalls
from cenote.proxy.peer cimport Peer, Sender

cdef int _IN, _OUT, _ENDED, _ROUNDS
cdef Py_ssize_t _SEND_BYTES

cdef class Poller:
    cdef public object loop
    cdef public object epoll
    cdef public int fd
    cdef public dict transports
    cdef public list unsent
    cdef public bint running
    cdef object __weakref__

    @cython.locals(ready=list)
    cpdef run(self)
    @cython.locals(fd=object, mask=int, transport=SocketTransport)
    cpdef serve(self, list ready)
    cpdef later(self, SocketTransport transport)
    @cython.locals(unsent=list, transport=SocketTransport)
    cpdef flush(self)

cdef class SocketTransport(Sender):
    cdef public Poller poller
    cdef public object sock
    cdef public int fd
    cdef public object protocol
    cdef public Peer peer
    cdef public list pending
    cdef public Py_ssize_t size
    cdef public Py_ssize_t high
    cdef public Py_ssize_t low
    cdef public bint full
    cdef public bint queued
    cdef public bint closing
    cdef public bint gone
    cdef public bint ending
    cdef public int mask
    cdef object __weakref__

    @cython.locals(data=bytes)
    cpdef readable(self, int mask)
    cpdef pause_reading(self)
    cpdef resume_reading(self)
    cpdef write(self, bytes data)
    @cython.locals(pending=list, data=bytes, sent=Py_ssize_t)
    cpdef flush(self)
    cpdef write_eof(self)
    cdef bytes _joined(self)
    cdef _shut(self)
    cpdef close(self)
    cpdef abort(self)
    cdef _fail(self, error)
    cdef _ask(self, int mask)
    cpdef set_protocol(self, protocol)
