-- One decision per ticket: a conditional update on the pending state, inside its deadline, by somebody else.
-- Locks: run, ticket, stream head. A parked run becomes queued again in the same transaction.
-- Answers {"status": "decided" | "refused", ...}; deciding again the same way by the same person answers the same.
CREATE FUNCTION engine_decide_ticket_v1(p_tenant uuid, p_ticket uuid, p_state text, p_by uuid, p_comment text, p_actor text)
RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_run    uuid;
    v_ticket approval_tickets;
BEGIN
    PERFORM engine_enter_v1(p_tenant);
    SELECT run_id INTO v_run FROM approval_tickets WHERE tenant_id = p_tenant AND id = p_ticket;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'PLN01', MESSAGE = 'not found', TABLE = 'approval ticket', DETAIL = p_ticket;
    END IF;
    PERFORM 1 FROM run_states WHERE tenant_id = p_tenant AND run_id = v_run FOR UPDATE;
    SELECT * INTO v_ticket FROM approval_tickets WHERE tenant_id = p_tenant AND id = p_ticket FOR UPDATE;
    IF v_ticket.requested_by = p_by THEN
        RETURN jsonb_build_object('status', 'refused', 'reason', 'separation_of_duties', 'run_id', v_run, 'message',
            'the requester of a call cannot decide its approval');
    ELSIF v_ticket.state = p_state AND v_ticket.decided_by = p_by THEN
        RETURN jsonb_build_object('status', 'decided', 'run_id', v_run, 'replayed', true);
    ELSIF v_ticket.state = 'expired' THEN
        RETURN jsonb_build_object('status', 'refused', 'reason', 'approval_expired', 'run_id', v_run, 'message',
            format('the deadline %s has passed; the call is denied', v_ticket.deadline));
    ELSIF v_ticket.state <> 'pending' THEN
        RETURN jsonb_build_object('status', 'refused', 'reason', 'already_decided', 'run_id', v_run, 'message',
            format('the ticket is already %s', v_ticket.state));
    ELSIF v_ticket.deadline <= clock_timestamp() THEN
        UPDATE approval_tickets SET state = 'expired' WHERE tenant_id = p_tenant AND id = p_ticket;
        PERFORM engine_append_event_v1(p_tenant, 'run/' || v_run, 'approval_expired', p_actor, jsonb_build_object(
            'ticket_id', p_ticket, 'step', v_ticket.step_index, 'attempt', v_ticket.attempt, 'deadline', v_ticket.deadline));
        UPDATE run_states SET state = 'queued', reason = NULL, message = NULL, updated_at = clock_timestamp()
            WHERE tenant_id = p_tenant AND run_id = v_run AND state = 'awaiting_approval';
        RETURN jsonb_build_object('status', 'refused', 'reason', 'approval_expired', 'run_id', v_run, 'message',
            format('the deadline %s has passed; the call is denied', v_ticket.deadline));
    END IF;
    UPDATE approval_tickets SET state = p_state, decided_at = clock_timestamp(), decided_by = p_by, comment = p_comment
        WHERE tenant_id = p_tenant AND id = p_ticket AND state = 'pending';
    UPDATE run_states SET state = 'queued', reason = NULL, message = NULL, updated_at = clock_timestamp()
        WHERE tenant_id = p_tenant AND run_id = v_run AND state = 'awaiting_approval';
    PERFORM engine_append_event_v1(p_tenant, 'run/' || v_run, 'approval_decided', p_actor, jsonb_strip_nulls(
        jsonb_build_object('ticket_id', p_ticket, 'step', v_ticket.step_index, 'attempt', v_ticket.attempt,
            'decision', p_state, 'digest', v_ticket.digest, 'comment', NULLIF(p_comment, ''))));
    RETURN jsonb_build_object('status', 'decided', 'run_id', v_run, 'replayed', false);
END
$$;
