-- Approval inside an admission: what a ticket means now, opening one, and using one up.

-- What a proposal that needs approval may do now. Answers what it changes of the verdict: nothing where it still has to
-- ask, {"outcome": "allow", "ticket_id"} under an approval, else a refusal. Locks the ticket; the run is locked already.
CREATE FUNCTION engine_ticket_v2(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_tenant uuid := (c ->> 'tenant_id')::uuid;
    v_ticket approval_tickets;
    v_reason text;
    v_text   text;
BEGIN
    IF c ->> 'ticket_id' IS NULL THEN
        RETURN '{}';
    END IF;
    SELECT * INTO v_ticket FROM approval_tickets
        WHERE tenant_id = v_tenant AND id = (c ->> 'ticket_id')::uuid AND run_id = (c ->> 'run_id')::uuid FOR UPDATE;
    IF v_ticket.id IS NULL OR v_ticket.step_index <> (c ->> 'step_index')::integer OR v_ticket.digest <> c ->> 'digest'
       OR v_ticket.policy_digest <> c ->> 'policy_digest' OR v_ticket.consumed_at IS NOT NULL THEN
        v_reason := 'approval_mismatch';
        v_text := 'the approval is for another call, another policy, or was already used';
    ELSIF v_ticket.state IN ('pending', 'approved') AND v_ticket.deadline <= clock_timestamp() THEN
        UPDATE approval_tickets SET state = 'expired'
            WHERE tenant_id = v_tenant AND id = v_ticket.id AND state = 'pending';
        v_reason := 'approval_expired';
        v_text := format('the approval was good until %s', v_ticket.deadline);
    ELSIF v_ticket.state = 'approved' THEN
        RETURN jsonb_build_object('outcome', 'allow', 'ticket_id', v_ticket.id);
    ELSIF v_ticket.state = 'pending' THEN
        RETURN jsonb_build_object('ticket_id', v_ticket.id, 'deadline', v_ticket.deadline);
    ELSIF v_ticket.state = 'denied' THEN
        v_reason := 'approval_denied';
        v_text := COALESCE('denied by the approver: ' || NULLIF(v_ticket.comment, ''), 'denied by the approver');
    ELSE
        v_reason := 'approval_expired';
        v_text := format('the approval ticket is %s', v_ticket.state);
    END IF;
    RETURN jsonb_build_object('outcome', 'deny', 'reason', v_reason, 'message', v_text, 'ticket_id', v_ticket.id,
        'unblock', 'an approval of this very call, asked for anew');
END
$$;

-- Opens the ticket of a step that has to ask; its row exists already.
CREATE FUNCTION engine_open_ticket_v2(c jsonb) RETURNS jsonb
LANGUAGE sql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    INSERT INTO approval_tickets (tenant_id, id, run_id, step_index, attempt, capability, resource, arguments, digest,
            policy_digest, tier, risk, requested_by, deadline)
        VALUES ((c ->> 'tenant_id')::uuid, (c #>> '{ticket,id}')::uuid, (c ->> 'run_id')::uuid,
            (c ->> 'step_index')::integer, (c ->> 'attempt')::integer, c ->> 'capability', c ->> 'resource',
            c -> 'arguments', c ->> 'digest', c ->> 'policy_digest', c #>> '{decision,tier}', c #>> '{decision,risk}',
            (c ->> 'requester')::uuid,
            clock_timestamp() + make_interval(secs => (c #>> '{ticket,seconds}')::double precision))
        RETURNING jsonb_build_object('ticket_id', id, 'deadline', deadline)
$$;

-- Uses an approval up, in the transaction that grants what it allowed.
CREATE FUNCTION engine_use_ticket_v2(p_tenant uuid, p_ticket uuid) RETURNS void
LANGUAGE sql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    UPDATE approval_tickets SET consumed_at = clock_timestamp() WHERE tenant_id = p_tenant AND id = p_ticket
$$;
