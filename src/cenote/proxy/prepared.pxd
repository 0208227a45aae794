cdef class Statement:
    cdef public bytes tail
    cdef public Reading reading
    cdef public long long used
    cdef public bint proved
    cdef public bint changed

cdef class Reading:
    cdef public int touches
    cdef public bint copies
    cdef public int reads
    cdef public int clears

cpdef Reading read(bytes text)
cpdef bint may_copy(bytes text)
