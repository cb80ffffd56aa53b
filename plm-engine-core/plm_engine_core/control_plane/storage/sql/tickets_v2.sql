-- Approval inside an admission: what a ticket means now, what stands approved already, opening a ticket, and using an
-- approval up. Locks: approval scope or ticket, after the run.

-- What a proposal that needs approval may do now. Answers what it changes of the verdict: nothing where it still has to
-- ask, {"outcome": "allow", ...} under an approval, else a refusal. Locks what it relies on; the run is locked already.
CREATE FUNCTION engine_ticket_v2(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_tenant uuid := (c ->> 'tenant_id')::uuid;
    v_ticket approval_tickets;
    v_reason text;
    v_text   text;
BEGIN
    IF c ->> 'ticket_id' IS NULL THEN
        RETURN engine_approval_scope_v2(c);
    END IF;
    SELECT * INTO v_ticket FROM approval_tickets
        WHERE tenant_id = v_tenant AND id = (c ->> 'ticket_id')::uuid AND run_id = (c ->> 'run_id')::uuid FOR UPDATE;
    IF v_ticket.id IS NULL OR v_ticket.step_index <> (c ->> 'step_index')::integer OR v_ticket.digest <> c ->> 'digest'
       OR v_ticket.policy_digest <> c ->> 'policy_digest' OR v_ticket.consumed_at IS NOT NULL
       OR v_ticket.superseded_by IS NOT NULL THEN
        RETURN jsonb_build_object('outcome', 'deny', 'reason', 'approval_mismatch', 'ticket_id', v_ticket.id,
            'message', 'the approval is for another call, another policy, or was already used',
            'unblock', 'an approval of this very call, asked for anew');
    END IF;
    v_ticket := engine_time_out_ticket_v2(v_ticket, c ->> 'actor');
    IF v_ticket.state = 'approved' AND v_ticket.deadline > clock_timestamp() THEN
        RETURN jsonb_build_object('outcome', 'allow', 'ticket_id', v_ticket.id);
    ELSIF v_ticket.state = 'pending' THEN
        RETURN jsonb_build_object('ticket_id', v_ticket.id, 'deadline', v_ticket.deadline);
    ELSIF v_ticket.state = 'denied' THEN
        v_reason := 'approval_denied';
        v_text := COALESCE('denied by the approver: ' || NULLIF(v_ticket.comment, ''), 'denied by the approver');
    ELSE
        v_reason := 'approval_expired';
        v_text := CASE WHEN v_ticket.state = 'cancelled' THEN 'the approval ticket is cancelled'
                       ELSE format('the approval was good until %s', v_ticket.deadline) END;
    END IF;
    RETURN jsonb_build_object('outcome', 'deny', 'reason', v_reason, 'message', v_text, 'ticket_id', v_ticket.id,
        'unblock', 'an approval of this very call, asked for anew');
END
$$;

-- Whether an approval scope covers a proposal: everything it is bound to is the same, and the risk is no higher. Where two
-- admissions want the last use of one, the second waits, finds it used up, and asks.
CREATE FUNCTION engine_approval_scope_v2(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_tenant uuid := (c ->> 'tenant_id')::uuid;
    v_ranks  constant text[] := ARRAY['low', 'medium', 'high'];
    v_agent  text;
    v_scope  approval_scopes;
BEGIN
    SELECT agent_id INTO v_agent FROM run_states WHERE tenant_id = v_tenant AND run_id = (c ->> 'run_id')::uuid;
    SELECT s.* INTO v_scope FROM approval_scopes AS s
        WHERE s.tenant_id = v_tenant AND s.capability = c ->> 'capability' AND s.agent = v_agent
          AND s.requested_by = (c ->> 'requester')::uuid AND s.policy_digest = c ->> 'policy_digest'
          AND (s.resource IS NULL OR s.resource = c ->> 'resource') AND s.tier = c #>> '{decision,tier}'
          AND array_position(v_ranks, c #>> '{decision,risk}') <= array_position(v_ranks, s.risk)
          AND s.revoked_at IS NULL AND s.expires_at > clock_timestamp() AND s.used < s.max_uses
        ORDER BY s.expires_at, s.id LIMIT 1 FOR UPDATE;
    IF NOT FOUND THEN
        RETURN '{}';
    END IF;
    RETURN jsonb_build_object('outcome', 'allow', 'approval_scope_id', v_scope.id);
END
$$;

-- Opens the ticket of a step that has to ask; its row exists already. It takes the place of the ticket that an earlier
-- attempt of the step opened, which nobody can decide or use from then on.
CREATE FUNCTION engine_open_ticket_v2(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_tenant   uuid := (c ->> 'tenant_id')::uuid;
    v_new      uuid := (c #>> '{ticket,id}')::uuid;
    v_deadline timestamptz := clock_timestamp() + make_interval(secs => (c #>> '{ticket,seconds}')::double precision);
    v_old      uuid;
BEGIN
    SELECT id INTO v_old FROM approval_tickets
        WHERE tenant_id = v_tenant AND run_id = (c ->> 'run_id')::uuid AND step_index = (c ->> 'step_index')::integer
          AND superseded_by IS NULL
        ORDER BY attempt DESC LIMIT 1 FOR UPDATE;
    INSERT INTO approval_tickets (tenant_id, id, run_id, step_index, attempt, capability, resource, arguments, digest,
            policy_digest, tier, risk, requested_by, deadline, escalate_seconds, supersedes)
        VALUES (v_tenant, v_new, (c ->> 'run_id')::uuid, (c ->> 'step_index')::integer, (c ->> 'attempt')::integer,
            c ->> 'capability', c ->> 'resource', c -> 'arguments', c ->> 'digest', c ->> 'policy_digest',
            c #>> '{decision,tier}', c #>> '{decision,risk}', (c ->> 'requester')::uuid, v_deadline,
            (c #>> '{ticket,escalate_seconds}')::double precision, v_old);
    IF v_old IS NOT NULL THEN
        UPDATE approval_tickets SET superseded_by = v_new,
                state = CASE state WHEN 'pending' THEN 'cancelled' ELSE state END
            WHERE tenant_id = v_tenant AND id = v_old;
    END IF;
    RETURN jsonb_strip_nulls(jsonb_build_object('ticket_id', v_new, 'deadline', v_deadline, 'supersedes', v_old));
END
$$;

-- Uses an approval up, in the transaction that grants what it allowed.
CREATE FUNCTION engine_use_approval_v2(p_tenant uuid, p_verdict jsonb) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF p_verdict ->> 'ticket_id' IS NOT NULL THEN
        UPDATE approval_tickets SET consumed_at = clock_timestamp()
            WHERE tenant_id = p_tenant AND id = (p_verdict ->> 'ticket_id')::uuid;
    ELSIF p_verdict ->> 'approval_scope_id' IS NOT NULL THEN
        UPDATE approval_scopes SET used = used + 1
            WHERE tenant_id = p_tenant AND id = (p_verdict ->> 'approval_scope_id')::uuid;
    END IF;
END
$$;
