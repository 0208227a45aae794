from cenote.proxy.reading cimport Reading

cdef class Statement:
    cdef public bytes tail
    cdef public Reading reading
    cdef public object meaning
    cdef public bint own
    cdef public long long used
    cdef public bint proved
    cdef public bint changed
