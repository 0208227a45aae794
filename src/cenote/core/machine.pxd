cimport cython
from cenote.core.agenda cimport Agenda
from cenote.core.codel cimport Codel
from cenote.core.growth cimport Growth
from cenote.core.histogram cimport Histogram
from cenote.core.ring cimport Node, Ring
from cenote.core.shelf cimport Shelf
from cenote.core.slot cimport Slot, Waiter

cdef class Machine:
    cdef public long min_size
    cdef public long max_size
    cdef public long limit
    cdef public long max_waiting
    cdef public double idle_timeout
    cdef public double max_lifetime
    cdef public double check_after
    cdef public str codel_mode
    cdef public object random

    cdef public str mode
    cdef public long size
    cdef public Shelf shelf
    cdef public Ring connecting
    cdef public Ring checking
    cdef public Ring leased
    cdef public Ring resetting
    cdef public Ring closing
    cdef public Ring waiting

    cdef public list effects
    cdef public double alarm
    cdef public Agenda agenda
    cdef public double drain_at
    cdef public Codel codel
    cdef public double codel_at

    cdef public Growth growth
    cdef public object budget
    cdef public long epoch
    cdef public double last_fatal

    cdef public long acquired
    cdef public long would_shed
    cdef public dict opened_by
    cdef public dict closed_by
    cdef public dict refused_by
    cdef public Histogram waits
    cdef public Histogram holds
    cdef public Histogram dials

    @cython.locals(slot=Slot, waiter=Waiter, growth=Growth)
    cpdef acquire(self, double now, double timeout, object settings=*, object data=*, bint again=*)
    @cython.locals(slot=Slot)
    cpdef abandon(self, Waiter waiter, double now, str reason=*)
    cpdef Slot accept(self, Waiter waiter)
    cpdef release(self, Slot slot, double now)
    cpdef release_touched(self, Slot slot, double now)
    cpdef release_broken(self, Slot slot, double now, str reason, str failure)

    cpdef reset_done(self, Slot slot, double now)
    cpdef reset_failed(self, Slot slot, double now, str failure)
    cpdef check_passed(self, Slot slot, double now, bint pinged)
    cpdef check_failed(self, Slot slot, double now, str reason, str failure)
    cpdef idle_lost(self, Slot slot, double now, str reason, str failure)
    cpdef bint dial_needed(self, Slot slot, double now)
    cpdef dialed(self, Slot slot, double now)
    cpdef dial_failed(self, Slot slot, double now, str failure)
    cpdef closed(self, Slot slot, double now)

    cpdef start(self, double now)
    cpdef drain(self, double now, double deadline)
    cpdef pause(self, double now)
    cpdef resume(self, double now)
    cpdef close(self, double now)
    cpdef resize(self, double now, long min_size, long max_size)
    cpdef give_way(self, bint idle)
    cpdef allow(self, double now, long limit)
    cpdef refresh(self, double now)
    cpdef tick(self, double now)

    cdef _order(self, str why, double now)
    cdef _want(self, str what, Slot slot)
    cdef _gone(self, Slot slot, Ring source)
    cdef _undialed(self, Slot slot)
    cdef _offer(self)
    cdef long _room(self)
    cdef _lease(self, Slot slot, double now)
    @cython.locals(held=double)
    cdef _end_lease(self, Slot slot, double now)
    cdef _close(self, Slot slot, str reason)
    @cython.locals(waiter=Waiter)
    cdef _place(self, Slot slot, double now, double unused_since)
    @cython.locals(chosen=Waiter, candidate=Waiter, passed=Waiter, looked=int)
    cdef Waiter _next_waiter(self, Slot slot, double now)
    @cython.locals(missing=long, newest=double, returning=long, room=long, dials=long, asked=long, nth=long, growth=Growth, blocked=bint)
    cdef _grow(self, double now)
    cdef _lost(self, Slot slot, double now, str reason, str failure)
    @cython.locals(other=Slot)
    cdef _judge(self, Slot slot, double now, str failure)
    cdef _advance_epoch(self)
    @cython.locals(slot=Slot)
    cdef _close_idle(self, str reason)
    @cython.locals(slot=Slot)
    cdef _close_oldest(self, str reason)
    @cython.locals(waiter=Waiter)
    cdef _refuse_all(self, str reason)
    cdef _refuse_later(self, Waiter waiter, str reason)
    cdef _refuse(self, Waiter waiter, str reason)
    cdef _count(self, dict counts, str word)
    cdef _arm(self, double when)
    cdef _look_after(self, Slot slot, double now)
    cdef double _check_due(self, Slot slot)
    cdef _time(self, Slot slot, double now)
    @cython.locals(waiter=Waiter)
    cdef _poll_codel(self, double now)
