cimport cython

cdef int _NONE, _QUERY, _SYNC, _PARSE, _NAMED_PARSE, _OWN_SYNC, _OWN_QUERY, _OWN_BRING, _BIND, _SYNTHETIC, _OWN_STEP

cdef class Entry:
    cdef public int kind
    cdef public object statement
    cdef public bytes name
    cdef public bytes reply
    cdef public object before
    cdef public object done
    cdef public object failed
    cdef public object rows
    cdef public bint tells
    cdef public bint guards

cdef class ReplyQueue:
    cdef public int kind
    cdef public bint open
    cdef public bint bound
    cdef public long sent
    cdef public long done
    cdef public bint dropped_unnamed
    cdef public Py_ssize_t dropped_binds
    cdef public bytearray behind
    cdef public Py_ssize_t next
    cdef public list entries

    cpdef expect(self, int kind)
    @cython.locals(kind=int)
    cpdef add(self, Entry entry)
    cpdef Entry entry(self)
    @cython.locals(at=Py_ssize_t, behind=bytearray)
    cpdef advance(self)
    cpdef ready(self)
    cpdef discard_to_sync(self)
    cpdef bint synced(self)
    @cython.locals(last=int)
    cpdef bint ends(self)
    cpdef bint uncertain(self, long at)
    cpdef bint only_ours(self)
    cpdef Py_ssize_t pending(self)
