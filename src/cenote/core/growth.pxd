cdef class Growth:
    cdef public object random
    cdef public double hold_s
    cdef public double dial_s
    cdef public long failures
    cdef public bint suspect
    cdef public double retry_at
    cdef public double look_at

    cpdef lease_ended(self, double held_s)
    cpdef dial_ended(self, double took_s)
    cpdef dial_failed(self, double now)
    cpdef long gate(self)
    cpdef long wanted(self, double now, long pending, long room, long missing, long waiting, long leased, double newest)
    cpdef bint served_sooner(self, double now, long waiting, long leased, double newest)
