cimport cython

cdef int _NONE, _SYNC, _PARSE, _OWN_PARSE, _OWN_CLOSE, _OWN_SYNC

cdef class Entry:
    cdef public int kind
    cdef public object statement
    cdef public bytes name
    cdef public bytes reply
    cdef public object done
    cdef public object failed

cdef class ReplyQueue:
    cdef public list items
    cdef public Py_ssize_t first
    cdef public int kind
    cdef public Entry entry
    cdef public bint open
    cdef public bint dropped_unnamed

    cpdef expect(self, int kind)
    cpdef add(self, Entry entry)
    @cython.locals(first=Py_ssize_t)
    cpdef advance(self)
    cpdef ready(self)
    cpdef discard_to_sync(self)
    cpdef Py_ssize_t pending(self)
