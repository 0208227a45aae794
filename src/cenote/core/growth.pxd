cdef class Gate:
    cdef public object random
    cdef public long pending
    cdef public long failures
    cdef public bint suspect
    cdef public double retry_at

    cpdef long width(self)
    cpdef passed(self)
    cpdef failed(self, double now)

cdef class Growth:
    cdef public Gate gate
    cdef public Gate own
    cdef public double hold_s
    cdef public double dial_s
    cdef public double look_at

    cpdef lease_ended(self, double held_s)
    cpdef dial_ended(self, double took_s)
    cpdef dial_failed(self, double now, bint permanent)
    cpdef bint failing(self)
    cpdef long width(self)
    cpdef long wanted(self, double now, long pending, long room, long missing, long waiting, long leased, double newest)
    cpdef bint served_sooner(self, double now, long waiting, long leased, double newest)
