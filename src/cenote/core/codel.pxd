cdef class Codel:
    cdef public double shortest_s
    cdef public double ends
    cdef public bint standing

    cpdef bint judge(self, double wait_s, double now)
