cdef class Session:
    cdef object __weakref__
    cdef public long touched
    cdef public bint attributes
    cdef public object last_sql
    cdef public double query_since_s
    cdef public double in_query_s
    cdef public long statements
    cdef public object sqlstate
    cdef public object kept
