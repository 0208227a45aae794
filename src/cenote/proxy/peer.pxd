cdef class Sender:
    cpdef write(self, bytes data)

cdef class Peer:
    cdef public object transport
    cdef public Sender sender
    cdef public object tls
    cdef public object inbox
    cdef public object handshake
    cdef public bint lost
    cdef public bint stalled
    cdef public bint muted
    cdef object __weakref__

    cpdef data_received(self, bytes data)
    cpdef received(self, bytes data)
    cpdef write(self, bytes data)
    cdef send(self, bytes data)
    cpdef mute(self)
    cpdef unmute(self)
    cpdef close(self)
    cpdef abort(self)
    cdef bytes _decrypt(self, bytes data)
