cdef class Reading:
    cdef public int touches
    cdef public bint copies
    cdef public int reads
    cdef public int clears
    cdef public bint builtin
    cdef public tuple customs
    cdef public tuple names_at
    cdef public bint untold
    cdef public tuple resets
    cdef public bytes fingerprint
    cdef public int ends
    cdef public int ties
    cdef public tuple unlistens
    cdef public tuple nulls_at
    cdef public bint alters
    cdef public bint hidden
    cdef public bint calls
    cdef public tuple said
    cdef public bint defines
    cdef public bint matters

cpdef Reading read(bytes text)
cpdef Reading change(bytes data, Py_ssize_t at, Py_ssize_t end)
cpdef bint may_copy(bytes text)
