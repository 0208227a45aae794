from cenote.proxy.peer cimport Peer

cdef class Borrower(Peer):
    cdef public object server
    cdef public object settings
    cdef public object waiter
    cdef public object declined
    cdef public object unnamed
    cdef public bint apart
    cdef public object guessed
    cdef public bint holding
    cdef public bint raw
    cdef public bint copy_asked
    cdef public bint order_asked
    cdef public bint noticed
    cdef public bint polite
    cdef public bint dropping
    cdef public Py_ssize_t left
    cdef public object startup
    cdef public int touched
    cdef public int ties
    cdef public object resets
    cdef public bint asking
    cdef public object conversion
    cdef public int losses
    cdef public long long bytes_out
    cdef public double since
    cdef public str pin
    cdef public object sight
    cdef public str address
    cdef public object ear

    cpdef answered(self, server)
    cpdef copy_begins(self)
    cpdef in_order(self)
    cpdef repeat(self, bytes batch)
    cpdef granted(self, server)
    cpdef hear(self)
    cpdef keep(self, server, str reason, int flags)
    cpdef unpin(self)
    cpdef own_names(self, server)
    cpdef go_on(self)
    cpdef bytes in_own_names(self, server, bytes body)
    cpdef define(self, bytes name, statement)
    cpdef undefine(self, bytes name, statement)
    cpdef forget_statements(self)
    cpdef go_on_after(self, server)
    cpdef refuse(self, bytes error)
    cpdef resubmit(self, bytes batch)

cdef class Lender:
    cdef public str name
    cdef public Py_ssize_t max_prepared
    cdef public long long tick
    cdef public bint reads_nothing
    cdef object __weakref__

    cpdef borrow(self, Borrower client)
    cpdef settled(self, Borrower client, lent)
    cpdef in_transaction(self, Borrower client, lent)
