-- An approval counts for the capability as it was defined when somebody was asked: where a call means something else by now,
-- it is asked for anew. What was denied, or nobody decided in time, stays so under whatever definition and policy. Ticket and
-- approval scope are as before in all else, for nodes of every release that admit.

-- The capability as the decision that opened a ticket describes it, by the event of the question, which nothing changes; null
-- where it describes none, or its event was pruned.
CREATE FUNCTION engine_asked_for_v1(p_tenant uuid, p_run uuid, p_ticket uuid) RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    RETURN (SELECT payload::jsonb #> '{decision,facts,capability}' FROM events
        WHERE tenant_id = p_tenant AND stream = 'run/' || p_run AND kind = 'approval_requested'
          AND payload::jsonb #>> '{answer,ticket_id}' = p_ticket::text
        ORDER BY seq LIMIT 1);
END
$$;

-- Whether a call means the same under two stored definitions: they differ in words, or in who may call, at the most. What is
-- no definition is like no other. `calls_alike` of the policy's facts is the same rule.
CREATE FUNCTION engine_calls_alike_v1(p_one jsonb, p_other jsonb) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_who_may constant text[] := ARRAY['status', 'description', 'required_scopes'];
BEGIN
    RETURN COALESCE(jsonb_typeof(p_one) = 'object' AND jsonb_typeof(p_other) = 'object', false)
       AND p_one - v_who_may = p_other - v_who_may;
END
$$;

-- What a proposal that needs approval may do now. Answers what it changes of the verdict: nothing where it still has to
-- ask, {"outcome": "allow", ...} under an approval, else a refusal. Locks what it relies on; the run is locked already.
CREATE OR REPLACE FUNCTION engine_ticket_v2(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_tenant uuid := (c ->> 'tenant_id')::uuid;
    v_ticket approval_tickets;
    v_reason text := 'approval_mismatch';
    v_text   text := 'the approval is for another call, another policy, or was already used';
BEGIN
    IF c ->> 'ticket_id' IS NULL THEN
        RETURN engine_approval_scope_v2(c);
    END IF;
    SELECT * INTO v_ticket FROM approval_tickets
        WHERE tenant_id = v_tenant AND id = (c ->> 'ticket_id')::uuid AND run_id = (c ->> 'run_id')::uuid FOR UPDATE;
    IF v_ticket.step_index = (c ->> 'step_index')::integer AND v_ticket.digest = c ->> 'digest'
       AND v_ticket.consumed_at IS NULL AND v_ticket.superseded_by IS NULL THEN
        v_ticket := engine_time_out_ticket_v2(v_ticket, c ->> 'actor');
        IF v_ticket.state = 'denied' THEN
            v_reason := 'approval_denied';
            v_text := COALESCE('denied by the approver: ' || NULLIF(v_ticket.comment, ''), 'denied by the approver');
        ELSIF v_ticket.state = 'cancelled' THEN
            v_reason := 'approval_expired';
            v_text := 'the approval ticket is cancelled';
        ELSIF v_ticket.state = 'expired' OR v_ticket.deadline <= clock_timestamp() THEN
            v_reason := 'approval_expired';
            v_text := format('the approval was good until %s', v_ticket.deadline);
        ELSIF v_ticket.policy_digest = c ->> 'policy_digest' AND engine_calls_alike_v1(
            engine_asked_for_v1(v_tenant, v_ticket.run_id, v_ticket.id), c #> '{decision,facts,capability}')
        THEN
            RETURN CASE v_ticket.state WHEN 'approved' THEN jsonb_build_object('outcome', 'allow', 'ticket_id', v_ticket.id)
                ELSE jsonb_build_object('ticket_id', v_ticket.id, 'deadline', v_ticket.deadline) END;
        END IF;
    END IF;
    RETURN jsonb_build_object('outcome', 'deny', 'reason', v_reason, 'message', v_text, 'ticket_id', v_ticket.id,
        'unblock', 'an approval of this very call, asked for anew');
END
$$;

-- Whether an approval scope covers a proposal: everything it is bound to is the same, and the risk is no higher. Where two
-- admissions want the last use of one, the second waits, finds it used up, and asks.
CREATE OR REPLACE FUNCTION engine_approval_scope_v2(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_tenant uuid := (c ->> 'tenant_id')::uuid;
    v_ranks  constant text[] := ARRAY['low', 'medium', 'high'];
    v_agent  text;
    v_scope  approval_scopes;
BEGIN
    SELECT agent_id INTO v_agent FROM run_states WHERE tenant_id = v_tenant AND run_id = (c ->> 'run_id')::uuid;
    SELECT s.* INTO v_scope FROM approval_scopes AS s
        JOIN approval_tickets AS t ON t.tenant_id = s.tenant_id AND t.id = s.ticket_id
        WHERE s.tenant_id = v_tenant AND s.capability = c ->> 'capability' AND s.agent = v_agent
          AND s.requested_by = (c ->> 'requester')::uuid AND s.policy_digest = c ->> 'policy_digest'
          AND (s.resource IS NULL OR s.resource = c ->> 'resource') AND s.tier = c #>> '{decision,tier}'
          AND array_position(v_ranks, c #>> '{decision,risk}') <= array_position(v_ranks, s.risk)
          AND s.revoked_at IS NULL AND s.expires_at > clock_timestamp() AND s.used < s.max_uses
          AND engine_calls_alike_v1(engine_asked_for_v1(v_tenant, t.run_id, t.id), c #> '{decision,facts,capability}')
        ORDER BY s.expires_at, s.id LIMIT 1 FOR UPDATE OF s;
    IF NOT FOUND THEN
        RETURN '{}';
    END IF;
    RETURN jsonb_build_object('outcome', 'allow', 'approval_scope_id', v_scope.id);
END
$$;
