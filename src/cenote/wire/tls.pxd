cdef class TlsFilter:
    cdef object _incoming
    cdef object _outgoing
    cdef object _pending
    cdef object _object
    cdef public bint established
    cdef public bint closed

    cpdef receive(self, ciphertext)
    cpdef send(self, plaintext)
    cpdef pending(self)
    cdef _read(self)
    cdef bint _shake(self) except -1
