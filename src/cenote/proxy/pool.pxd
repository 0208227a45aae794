cimport cython
from cenote.core.histogram cimport Histogram
from cenote.core.machine cimport Machine
from cenote.core.slot cimport Slot, Waiter
from cenote.proxy.carrying cimport Carrying
from cenote.proxy.roles cimport Borrower
from cenote.proxy.server cimport ServerConnection

cdef class ProxyPool(Carrying):
    cdef public object daemon
    cdef public str database
    cdef public str user
    cdef public str mode
    cdef public bint statement_mode
    cdef public double acquire_timeout
    cdef public object budget
    cdef public set servers
    cdef public long clients
    cdef public dict base
    cdef public bint audits_all
    cdef public double customs_at
    cdef public long long customs_of
    cdef public bint minds_sequences
    cdef public object watch
    cdef public long incidents
    cdef public long audits_done
    cdef public long long queries
    cdef public long long errors
    cdef public long long bytes_from_clients
    cdef public long long bytes_to_clients
    cdef public long replays
    cdef public Histogram transaction_s
    cdef public Histogram query_s

    @cython.locals(now=double, server=ServerConnection, slot=Slot)
    cpdef borrow(self, Borrower client)
    cdef _lend(self, ServerConnection server, Borrower client, double now)
    @cython.locals(now=double, server=ServerConnection)
    cpdef settled(self, Borrower client, lent)
    @cython.locals(now=double, server=ServerConnection)
    cpdef in_transaction(self, Borrower client, lent)
    @cython.locals(machine=Machine, effects=list, client=Borrower, server=ServerConnection, slot=Slot)
    cpdef perform(self)
    cdef _account(self, ServerConnection server, double now)
    cdef _part(self, Borrower client, ServerConnection server)
